"""Replies read in pieces: the same result for every split, nothing lost, malformed replies answered as the module says."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import RequestError
from ernie45.tokens.messages import ToolCall
from ernie45.tokens.parse import FORMATS, Reply, ReplyParser, collect, parse_reply

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\"ris</tool_call>", "days": [1, {}]}}\n</tool_call>\n'
ARGUMENTS = '{"city": "Pa\\"ris</tool_call>", "days": [1, {}]}'
PIECES = [
    "<think>",
    "</think>",
    "<response>",
    "</response>",
    "<tool_call>",
    "</tool_call>",
    "<",
    "</",
    "tool_call>",
    "\n",
    "\n\n",
    "a",
    " ",
    "\u4f60",
]
PIECES += ['{"name": "f", "arguments": {"x": 1}}', '{"name"', ': "g"', ', "arguments": ', "{}", "}", '"', "\\", "null", "[", "]", CALL]
replies = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
starts = [(format.name, start) for format in FORMATS.values() for start in ("content", "reasoning") if start in format.blocks]


@pytest.mark.parametrize(
    ("format", "start", "text", "expected"),
    [
        ("plain", "content", "\n<think> is text\n\n", Reply("\n<think> is text\n\n", None, ())),
        ("ernie-thinking", "reasoning", "because\n</think>\n\n<response>\nhi\n\nyou\n</response>\n", Reply("hi\n\nyou", "because", ())),
        ("ernie-thinking", "reasoning", "\na\n\n\n</think>\n\n\n<response>\n\nx\n\n</response>", Reply("\nx\n", "a\n\n", ())),
        ("ernie-thinking", "reasoning", "<think>\nr</think>plain answer", Reply("plain answer", "r", ())),
        ("ernie-thinking", "content", "<response>\nx\n</response>", Reply("x", None, ())),
        ("ernie-thinking", "reasoning", "r\n</think>\n\n" + CALL * 2, Reply("", "r", (ToolCall("weather", ARGUMENTS),) * 2)),
        ("think", "reasoning", "r\n</think>\n\nThe answer\n", Reply("The answer\n", "r", ())),
        ("think", "content", "<think>\n\n</think>\n\nThe answer", Reply("The answer", None, ())),
        ("think", "content", "use <think> and </think>", Reply("use <think> and </think>", None, ())),
        ("think", "content", "Let me look.\n\n" + CALL + "\nDone", Reply("Let me look.Done", None, (ToolCall("weather", ARGUMENTS),))),
        # without an end
        ("ernie-thinking", "reasoning", "never ends\n", Reply("", "never ends\n", ())),
        ("ernie-thinking", "reasoning", "r</think><response>\ncut </resp", Reply("cut </resp", "r", ())),
        ("ernie-thinking", "reasoning", "a <think> b </response>", Reply("", "a <think> b </response>", ())),
        ("think", "content", "a </tool_call> b <tool", Reply("a </tool_call> b <tool", None, ())),
    ],
)
def test_formats(format, start, text, expected):
    assert parse_reply(text, format, start) == expected


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"name": "f"}', ToolCall("f", "{}")),
        ('{"name": "f", "arguments": null}', ToolCall("f", "{}")),
        ('{"arguments": {"a": 1}, "name": "f"}', ToolCall("f", '{"a": 1}')),
        ('{"name": "f", "arguments": "{\\"a\\": 1}", "id": 5}', ToolCall("f", '{"a": 1}')),
        ('{"name": "f", "arguments": {"a": 1}}}', ToolCall("f", '{"a": 1}')),  # what follows a whole object is ignored
        ('{"name": "f", "arguments": {"a": 1}', ToolCall("f", '{"a": 1}')),  # only the outer bracket is missing
        ('{"name": "f", "arguments": {"a": 1', ToolCall("f", '{"a": 1', valid=False)),
        ('{"name": "f", "arguments": {"a": "x\ny"}}', ToolCall("f", '{"a": "x\ny"}}', valid=False)),
        ('{"name": "f", "arguments": {a}}', ToolCall("f", "{a}", valid=False)),
        ('{"name": "f", "arguments": [1]}', ToolCall("f", "[1]", valid=False)),
        ('{"name": "f", "arg', ToolCall("f", "", valid=False)),
        ('{"name": "\\u4f60", "arguments": {}}', ToolCall("\u4f60", "{}")),
    ],
)
def test_tool_calls_whole_and_broken(body, call):
    assert parse_reply(f"<tool_call>{body}</tool_call>", "think") == Reply("", None, (call,))


@pytest.mark.parametrize(
    "body", ["", "weather(Paris)", "{'name': 'f'}", '{"arguments": {}}', '{"name": 5}', '[{"name": "f"}]', '{"name": "\\ud800"}']
)
def test_what_is_no_call_is_given_back(body):
    text = f"a <tool_call>\n{body}\n</tool_call>\n\nb"
    assert parse_reply(text, "think") == Reply(text, None, ())


@pytest.mark.parametrize(("format", "start"), starts)
@given(text=replies, data=st.data())
def test_every_split_gives_the_same_reply(format, start, text, data):
    parser, deltas, at = ReplyParser(format, start), [], 0
    while at < len(text):
        step = data.draw(st.integers(1, 7))
        deltas += parser.push(text[at : at + step])
        at += step
    deltas += parser.finish()
    whole = parse_reply(text, format, start)
    assert collect(deltas) == whole
    for call in whole.tool_calls:
        assert call.valid == _is_object(call.arguments)
    named = [delta.index for delta in deltas if delta.name]
    ended = [delta.index for delta in deltas if delta.valid is not None]
    assert named == ended == list(range(len(whole.tool_calls)))


@given(st.text("ab<>/thinkrespol_\n", max_size=60))
def test_plain_text_passes_unchanged(text):
    assert parse_reply(text, "plain") == Reply(text, None, ())


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=5)),
    st.booleans(),
)
def test_any_arguments_arrive_as_written(arguments, ascii_only):
    raw = json.dumps(arguments, ensure_ascii=ascii_only)
    text = '<tool_call>\n{"name": "f", "arguments": ' + raw + "}\n</tool_call>"
    assert parse_reply(text, "think").tool_calls == (ToolCall("f", raw),)


def test_arguments_are_passed_on_while_they_are_written():
    parser = ReplyParser("think")
    seen = [delta for char in CALL for delta in parser.push(char)]
    assert seen[0].name == "weather"
    assert len([delta for delta in seen if delta.arguments]) == len(ARGUMENTS)
    assert seen[-1].valid is True


def test_text_is_held_back_no_longer_than_needed():
    parser = ReplyParser("ernie-thinking", "reasoning")
    assert [delta.text for delta in parser.push("one\n")] == ["one"]
    assert [delta.text for delta in parser.push("<b")] == ["\n<b"]  # no tag begins so
    assert parser.push("</th") == []
    assert [delta.text for delta in parser.push("x")] == ["</thx"]


@pytest.mark.parametrize("unit", ["<think>", "<tool_call>x</tool_call>", '<tool_call>{"name": "f"}</tool_call>', "\n", "a<", CALL])
def test_time_grows_with_the_reply_and_not_faster(unit):
    """Four times the reply takes about four times as long; quadratic would be sixteen. Nine leaves room for noise."""

    def seconds(size):
        text, best = unit * (size // len(unit)), 1e9
        for _ in range(2):
            begin = time.perf_counter()
            parse_reply(text, "ernie-thinking")
            best = min(best, time.perf_counter() - begin)
        return best

    small = seconds(20_000)
    assert seconds(80_000) < 9 * small + 0.01


def test_unknown_names_are_answered():
    with pytest.raises(RequestError, match="did you mean 'plain'"):
        ReplyParser("plian")
    with pytest.raises(RequestError, match="cannot start in 'reasoning'"):
        ReplyParser("plain", "reasoning")
    assert "</think>" in FORMATS["think"].tags


def _is_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
