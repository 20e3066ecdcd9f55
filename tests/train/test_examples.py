"""Records as examples, through the templates that serving uses: what is learned is the answers and their ends."""

import pytest

from ernie45.errors import DataError
from ernie45.tokens.template import IGNORED, family_template
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.train.examples import as_example, make_examples
from ernie45.train.preference import as_pair, make_each
from ernie45.train.records import as_record
from tests.tokens.conftest import PLACEHOLDERS, TAGS, write_pieces_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_pieces_folder(tmp_path_factory.mktemp("tokens") / "tagged", PLACEHOLDERS[:1] + TAGS))


@pytest.fixture(scope="module")
def template(tokenizer):
    return family_template("ernie-text", tokenizer)


def learned(example):
    return [label for label in example.labels if label != IGNORED]


def test_answers_are_learned_and_questions_are_not(template, tokenizer):
    record = as_record({"src": ["one two", "three"], "tgt": ["four", "five six"]}, "f")
    example = as_example(record, template, tokenizer)
    text = tokenizer.decode(learned(example))
    assert "four" in text
    assert "five six" in text
    assert "one" not in text
    assert "three" not in text
    # the end of an answer is learned as the end of a text, which is what stops generation
    assert learned(example)[-1] == tokenizer.eos_ids[0]


def test_a_turn_labelled_0_is_not_learned(template, tokenizer):
    row = {"src": ["one two", "three"], "tgt": ["four", "five six"], "label": [0, 1]}
    text = tokenizer.decode(learned(as_example(as_record(row, "f"), template, tokenizer)))
    assert "four" not in text
    assert "five six" in text


def test_a_row_without_anything_to_learn_is_refused(template, tokenizer):
    for row in ({"src": ["a"], "tgt": ["b"], "label": [0]}, {"messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(DataError, match="line 4: nothing in it is learned"):
            as_example(as_record(row, "f: line 4"), template, tokenizer)


def test_a_text_is_learned_whole_and_ends(template, tokenizer):
    example = as_example(as_record({"text": "some words"}, "f"), template, tokenizer)
    assert example.ids == example.labels == (*tokenizer.encode("some words"), tokenizer.eos_ids[0])


def test_thinking_and_tool_calls_are_learned(tokenizer):
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "x"}}}
    row = {
        "messages": [
            {"role": "user", "content": "What does x cost?"},
            {"role": "assistant", "content": "<think>look it up\n</think>", "tool_calls": [call]},
            {"role": "tool", "content": [{"price": 3}]},
            {"role": "assistant", "content": "<think>it is 3</think>\n\nIt costs 3."},
        ],
        "tools": [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}],
    }
    example = as_example(as_record(row, "f"), family_template("ernie-thinking", tokenizer), tokenizer)
    text = tokenizer.decode(learned(example), skip_special=False)
    assert '{"name": "price", "arguments": {"of": "x"}}' in text
    assert "it is 3" in text
    assert "It costs 3." in text
    assert '"price": 3' not in text


def test_what_a_template_cannot_say_is_a_bad_row(template, tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"function": {"name": "x"}}]}
    bad = []
    rows = [
        as_record(row, "f: line 1"),
        as_record({"src": ["a"], "tgt": ["b"]}, "f: line 2"),
        as_record({"text": "long " * 50}, "f: line 3"),
    ]
    assert len(make_examples(rows, template, tokenizer, 40, on_bad=bad.append)) == 1
    assert [str(error).split(":")[1] for error in bad] == [" line 1", " line 3"]
    with pytest.raises(DataError, match="have no tools"):
        make_examples(rows, template, tokenizer, 40)


def test_a_pair_shares_its_prompt_up_to_the_token_before_the_answers(template, tokenizer):
    row = {"src": ["one", "two"], "tgt": ["three"], "response": [["four five"], ["six"]], "sort": [0, 2]}
    pair = as_pair(as_record(row, "f"), template)
    assert pair.chosen[0] == pair.rejected[0]
    assert pair.chosen_labels[0] == pair.rejected_labels[0] == IGNORED
    assert "six" in tokenizer.decode([label for label in pair.chosen_labels if label != IGNORED])
    assert "four five" in tokenizer.decode([label for label in pair.rejected_labels if label != IGNORED])
    assert "three" in tokenizer.decode(pair.prefix)
    assert pair.gap == 2


def test_answers_that_begin_alike_are_both_whole(template, tokenizer):
    row = {"prompt": "one", "chosen": "two three", "rejected": "two four"}
    pair = as_pair(as_record(row, "f"), template)
    for labels, text in ((pair.chosen_labels, "two three"), (pair.rejected_labels, "two four")):
        assert text in tokenizer.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"src": ["a"], "tgt": ["b"]}, "no preference pair"),
        ({"prompt": "a", "chosen": "b " * 100, "rejected": "c"}, "more than the limit"),
    ],
)
def test_a_pair_that_teaches_nothing_is_named(template, row, says):
    with pytest.raises(DataError, match=f"line 7.*{says}"):
        make_each([as_record(row, "f: line 7")], lambda record: [as_pair(record, template)], 60)
