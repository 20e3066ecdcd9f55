"""Rows of every kind, and bad rows: each is named by file, line and field."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from ernie45.errors import DataError
from ernie45.tokens.messages import Message
from ernie45.train.records import Conversation, Document, Preference, as_record, find_files, read_records, read_weighted


def roles(messages):
    return [(m.role, m.content) for m in messages]


def test_erniekit_rows_with_system_and_labels():
    row = {"src": ["a", "c"], "tgt": ["b", "d"], "system": "s", "label": [0, 1]}
    record = as_record(row, "f")
    assert roles(record.messages) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert [m.learned for m in record.messages if m.role == "assistant"] == [False, None]


def test_messages_split_thinking_and_name_tool_calls():
    call = {"type": "function", "function": {"name": "price", "arguments": {"of": "x"}}}
    row = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "<think>hm\n</think>", "tool_calls": [call]},
            {"role": "tool", "content": [{"price": 3}]},
            {"role": "assistant", "content": "3"},
        ],
        "tools": [{"type": "function", "function": {"name": "price"}}],
    }
    record = as_record(row, "f")
    assert record.messages[1].reasoning == "hm"
    assert record.messages[1].content == ""
    assert record.messages[1].tool_calls[0].id == record.messages[2].tool_call_id
    assert json.loads(record.messages[2].content) == [{"price": 3}]
    assert record.tools[0]["function"]["name"] == "price"


def test_alpaca_sharegpt_text_and_pairs():
    alpaca = as_record({"instruction": "do", "input": "this", "output": "done", "history": [["q", "a"]]}, "f")
    assert roles(alpaca.messages) == [("user", "q"), ("assistant", "a"), ("user", "do\nthis"), ("assistant", "done")]
    share = as_record({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, "f")
    assert roles(share.messages) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert as_record({"text": "abc"}, "f") == Document("f", "abc")
    assert as_record({"tgt": ["abc"]}, "f") == Document("f", "abc")
    pair = as_record({"prompt": "q", "chosen": "good", "rejected": [{"role": "assistant", "content": "bad"}]}, "f")
    assert pair == Preference("f", (Message("user", "q"),), (Message("assistant", "good"),), (Message("assistant", "bad"),))


def test_the_larger_number_marks_the_better_response():
    row = {"src": ["q", "r"], "tgt": ["a"], "response": [["bad"], ["good", "more?", "yes"]], "sort": [1, 3]}
    record = as_record(row, "f")
    assert roles(record.chosen) == [("assistant", "good"), ("user", "more?"), ("assistant", "yes")]
    assert roles(record.rejected) == [("assistant", "bad")]
    assert record.gap == 2
    assert roles(record.prompt) == [("user", "q"), ("assistant", "a"), ("user", "r")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "must be an object"),
        ({}, "fields (none)"),
        ({"messagess": []}, "did you mean 'messages'"),
        ({"src": ["a"], "tgt": []}, "'src' has 1 turns and 'tgt' has 0"),
        ({"src": [], "tgt": []}, "at least one"),
        ({"src": "a", "tgt": [1]}, "'tgt' must be a list of texts"),
        ({"src": ["a"], "tgt": ["b"], "label": [2]}, "'label'"),
        ({"src": ["a"], "tgt": ["b"], "system": 3}, "'system' must be a text"),
        ({"messages": []}, "'messages' must be a list of at least one"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "did you mean 'user'"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "name must be a text"),
        ({"messages": ["hello"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "{"}, "'tools': is not JSON"),
        ({"conversations": [{"from": "dog", "value": "a"}]}, "role 'dog'"),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, "use 'messages'"),
        ({"instruction": "a", "output": 3}, "'output' must be a text"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "'history'"),
        ({"text": ""}, "text is empty"),
        ({"src": ["a"], "tgt": [], "response": [["x"], ["y", "z"]], "sort": [1, 0]}, "odd number"),
        ({"src": ["a"], "tgt": [], "response": [["x"], ["y"]], "sort": [1, 1]}, "two different numbers"),
        ({"src": ["a"], "tgt": ["b"], "response": [["x"], ["y"]], "sort": [1, 0]}, "one turn more"),
    ],
)
def test_a_bad_row_names_place_and_field(row, says):
    with pytest.raises(DataError) as caught:
        as_record(row, "data.jsonl: line 3")
    assert str(caught.value).startswith("data.jsonl: line 3: ")
    assert says in str(caught.value)


def test_files_of_every_kind_are_read_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"src": ["1"], "tgt": ["x"]}\n\n{"src": ["2"], "tgt": ["x"]}', "utf-8")
    (tmp_path / "b.json").write_text('[{"src": ["3"], "tgt": ["x"]}]', "utf-8")
    (tmp_path / "c.csv").write_text('instruction,input,output\n4,,x\n"5\n6",,x\n', "utf-8")
    (tmp_path / "d.txt").write_text("\ufeffseven", "utf-8")
    (tmp_path / "e.md").write_text("no data", "utf-8")
    records = list(read_records([tmp_path]))
    asked = [r.messages[0].content if isinstance(r, Conversation) else r.text for r in records]
    assert asked == ["1", "2", "3", "4", "5\n6", "seven"]
    assert records[1].where.endswith("a.jsonl: line 4")
    assert list(read_records([tmp_path / "*.json*"])) == records[:3]


def test_files_that_are_not_there_or_not_read_are_named(tmp_path):
    for path, says in [(tmp_path / "none.jsonl", "no such file"), (tmp_path, "no such file")]:
        with pytest.raises(DataError, match=says):
            find_files([path])
    (tmp_path / "x.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'\.pdf' are not read"):
        find_files([tmp_path / "x.pdf"])


def test_bad_rows_can_be_counted_instead(tmp_path):
    good = '{"src": ["1"], "tgt": ["x"]}\n'
    (tmp_path / "a.jsonl").write_text(good + "{half\n" + '{"src": ["1"]}\n' + good, "utf-8")
    bad = []
    assert len(list(read_records([tmp_path / "a.jsonl"], bad.append))) == 2
    assert [str(error).split(": ")[1] for error in bad] == ["line 2", "line 3"]
    with pytest.raises(DataError, match="line 2: is not JSON"):
        list(read_records([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"\xff\xfe\x00"), ("a.csv", b"x,y\n\xff,1\n"), ("a.txt", b"\xff")])
def test_another_encoding_is_said(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="is not UTF-8 at byte"):
        list(read_records([tmp_path / name]))


def test_a_row_of_another_width_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\n1\n", "utf-8")
    with pytest.raises(DataError, match="line 2: has another number of columns"):
        list(read_records([tmp_path / "a.csv"]))


def test_parquet_rows_are_rows(tmp_path):
    rows = [{"text": "one"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"text": "three"}]
    columns = {key: [row.get(key) for row in rows] for key in ("text", "messages")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    made = list(read_records([tmp_path / "rows.parquet"]))
    assert [record.where.rpartition(": ")[2] for record in made] == ["row 1", "row 2", "row 3"]
    assert made[0] == Document(made[0].where, "one")
    assert roles(made[1].messages) == [("user", "a"), ("assistant", "b")]


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 50] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet: is no Parquet file"):
        list(read_records([path]))


def test_weights_say_how_often_a_row_is_seen(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{n}"}) + "\n" for n in range(400)))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    seen = Counter(record.text for record in read_weighted(paths, (2.0, 0.25), seed=1))
    assert {seen[f"a{n}"] for n in range(400)} == {2}
    assert 70 <= sum(seen[f"b{n}"] for n in range(400)) <= 130
    assert list(read_weighted(paths, (2.0, 0.25), 1)) == list(read_weighted(paths, (2.0, 0.25), 1))
    assert list(read_weighted(paths, (), 1)) == list(read_records(paths))
    for weights, said in (((1.0,), "1 numbers for 2 names"), ((1.0, 0.0), "above 0"), ((1.0, float("nan")), "above 0")):
        with pytest.raises(DataError, match=said):
            list(read_weighted(paths, weights, 1))
