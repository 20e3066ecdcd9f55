"""Rows with pictures as users have them: ERNIEKit's, OpenAI's, and texts with `<image>` words; what is wrong is named by line and field."""

import json
from pathlib import Path

import pytest

from ernie45.errors import DataError
from ernie45.tokens.messages import Image, Text, Video
from ernie45.train.picture_rows import Interleaved
from ernie45.train.records import Conversation, as_record, read_records

TALK = {
    "image_info": [{"matched_text_index": 0, "image_url": "a.png"}, {"matched_text_index": 2, "image_url": "./b/c.jpg"}],
    "text_info": [
        {"text": "What is this?", "tag": "mask"},
        {"text": "A cat.", "tag": "no_mask"},
        {"text": "And ", "tag": "mask"},
        {"text": "this?", "tag": "mask"},
        {"text": "<think>\nhm\n</think>\n\nA dog.", "tag": "no_mask"},
    ],
    "system": "Be brief.",
}


def test_erniekits_row_is_a_conversation():
    record = as_record(TALK, "f: line 1")
    assert isinstance(record, Interleaved)
    system, first, cat, second, dog = record.messages()
    assert (system.role, system.text) == ("system", "Be brief.")
    assert first.parts == (Image(source="a.png"), Text("What is this?"))
    assert cat.text == "A cat."
    assert second.parts == (Image(source="./b/c.jpg"), Text("And "), Text("this?"))
    assert (dog.text, dog.reasoning) == ("A dog.", "hm")


def test_videos_and_order():
    row = {
        "image_info": [{"matched_text_index": 0, "image_url": "i0"}, {"matched_text_index": 0, "image_url": "i1"}],
        "video_info": [{"matched_text_index": 0, "image_url": "v0"}],
        "text_info": [{"text": "Look", "tag": "mask"}, {"text": "yes", "tag": "no_mask"}],
    }
    named = lambda record: [part.source for part in record.messages()[0].media]  # noqa: E731
    assert named(as_record(row, "f")) == ["i0", "i1", "v0"]
    ordered = row | {"order": {"type": ["image", "video", "image", "text", "text"], "index": [1, 0, 0, 0, 1]}}
    assert named(as_record(ordered, "f")) == ["i1", "v0", "i0"]
    with pytest.raises(DataError, match="'order' places 1 pictures and videos, and the row has 3"):
        as_record(row | {"order": {"type": ["image"], "index": [0]}}, "f")
    with pytest.raises(DataError, match="'order' speaks of video 3"):
        as_record(row | {"order": {"type": ["video"], "index": [3]}}, "f")


def test_paths_are_taken_from_the_folder_of_the_rows(tmp_path):
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "train.jsonl"
    inline = "data:image/png;base64,AAAA"
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in ("x.png", "/abs/y.png", inline, "file:z.png")]
    rows = [TALK, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, theirs = read_records([file])
    assert [part.source for part in ours.messages()[1].media] == [str(file.parent / "a.png")]
    assert [Path(part.source) for part in ours.messages()[3].media] == [file.parent / "b" / "c.jpg"]
    assert [part.source for part in theirs.messages[0].media] == [str(file.parent / "x.png"), "/abs/y.png", inline, "file:z.png"]


def test_words_for_pictures_in_messages():
    row = {
        "messages": [
            {"role": "user", "content": "<image>What is <image>?"},
            {"role": "assistant", "content": "Say <image> in text."},
            {"role": "user", "content": "<video>"},
            {"role": "assistant", "content": "yes"},
        ],
        "images": ["a", "b"],
        "videos": ["v"],
    }
    record = as_record(row, "f")
    assert isinstance(record, Conversation)
    first, answer, second, _ = record.messages
    assert first.parts == (Image(source="a"), Text("What is "), Image(source="b"), Text("?"))
    assert answer.text == "Say <image> in text."
    assert second.parts == (Video(source="v"),)
    with pytest.raises(DataError, match="f: has more words <image> than entries in 'images'"):
        as_record(row | {"images": ["a"]}, "f")
    with pytest.raises(DataError, match="f: 'images' has 1 entries more than the texts have words <image>"):
        as_record(row | {"images": ["a", "b", "c"]}, "f")


def test_a_picture_without_a_word_stands_before_the_first_question():
    row = {"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]}
    assert as_record(row, "f").messages[0].parts == (Image(source="a.jpg"), Text("What?"))
    plain = {"messages": [{"role": "user", "content": "Write <image>"}, {"role": "assistant", "content": "<image>"}]}
    assert as_record(plain, "f").messages[0].text == "Write <image>"


def test_texts_with_pictures_are_learned_whole():
    record = as_record({"text": "Here <image> is a cat.", "images": "cat.png"}, "f")
    assert [(passage.part, passage.learned) for passage in record.passages] == [
        (Text("Here "), True),
        (Image(source="cat.png"), False),
        (Text(" is a cat."), True),
    ]
    caption = as_record({"image": "cat.png", "text": "a cat"}, "f")
    assert [passage.part for passage in caption.passages] == [Image(source="cat.png"), Text("a cat")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_info": []}, "'text_info' must be a list of at least one text"),
        ({"text_info": [{"text": 3, "tag": "mask"}], "image_info": []}, r"text_info\[0\] must be an object with 'text' and 'tag'"),
        ({"text_info": [{"text": "a", "tag": "maks"}], "image_info": []}, r"text_info\[0\]: 'tag' must be mask .* not 'maks'"),
        ({"text_info": [{"text": "a", "tool_calls": [1]}], "image_info": []}, r"text_info\[0\] has 'tool_calls'"),
        ({"image_info": {"image_url": "a"}}, "'image_info' must be a list, not dict"),
        ({"image_info": ["a.png"]}, r"image_info\[0\] must be an object"),
        (
            {"image_info": [{"matched_text_index": 9, "image_url": "a"}]},
            r"image_info\[0\]: 'matched_text_index' must be a number from 0 to 5",
        ),
        ({"image_info": [{"matched_text_index": True, "image_url": "a"}]}, "'matched_text_index' must be"),
        ({"video_info": [{"matched_text_index": 0, "image_url": ""}]}, r"video_info\[0\]: 'image_url' must be a path"),
        ({"order": ["image"]}, "'order' must hold the lists"),
        ({"system": 4}, "'system' must be a text"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(DataError, match=f"^rows.jsonl: line 7: .*{said}"):
        as_record(TALK | change, "rows.jsonl: line 7")


def test_a_row_that_begins_with_an_answer_is_no_conversation():
    row = {"image_info": [], "text_info": [{"text": "a", "tag": "no_mask"}]}
    with pytest.raises(DataError, match="f: as a conversation 'text_info' begins with a text of tag mask"):
        as_record(row, "f").messages()
