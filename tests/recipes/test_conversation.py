"""Turns as data: what fits, and the file they are kept in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError, RequestError
from ernie45.recipes.conversation import Turn, fit, load, save


def count(turns):
    return sum(len(turn.content) for turn in turns)


def turn(role, size, interrupted=False):
    return Turn(role=role, content="x" * size, interrupted=interrupted)


exchanges = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=8)


@given(st.integers(0, 20), exchanges, st.integers(1, 60), st.integers(2, 200), st.none() | st.integers(1, 100))
def test_what_is_sent_fits_and_keeps_system_and_question(system, earlier, question, limit, max_tokens):
    turns = [turn("system", system)] if system else []
    for asked, answered in earlier:
        turns += [turn("user", asked), turn("assistant", answered)]
    turns.append(turn("user", question))
    room = min(256 if max_tokens is None else max_tokens, limit // 2)
    alone = system + question
    if alone >= limit or (max_tokens is not None and alone + room > limit):
        # refused only when the question alone is too long, with the numbers
        with pytest.raises(RequestError, match=rf"prompt of {alone:,} tokens .* is {limit:,};"):
            fit(turns, count, limit, max_tokens)
        return
    fitted = fit(turns, count, limit, max_tokens)
    assert fitted.tokens == count(fitted.turns) < limit
    assert fitted.turns[-1] == turns[-1]
    assert not system or fitted.turns[0] == turns[0]
    assert len(fitted.turns) + fitted.dropped == len(turns)
    body = fitted.turns[bool(system) :]
    assert body == tuple(turns[len(turns) - len(body) :])
    assert body[0].role == "user"


def test_nothing_is_dropped_without_need():
    turns = [turn("user", 10), turn("assistant", 10), turn("user", 10)]
    assert fit(turns, count, 1000, None).dropped == 0
    assert fit(turns, count, 40, 10).dropped == 0
    assert fit(turns, count, 39, 10).dropped == 2


@pytest.mark.parametrize("text", ["plain", "中文 🎉", "line\nline", "\x1b[31m", '"quotes"', ""])
def test_a_saved_conversation_comes_back_whole(tmp_path, text):
    turns = [
        Turn(role="system", content="s"),
        Turn(role="user", content=text),
        Turn(role="assistant", content=text, reasoning="r", interrupted=True),
    ]
    save(tmp_path / "chat.json", "Model", turns)
    assert load(tmp_path / "chat.json") == turns
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_markdown_is_written_to_be_read(tmp_path):
    save(tmp_path / "chat.md", "Model", [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello", interrupted=True)])
    text = (tmp_path / "chat.md").read_text()
    assert "## You\n\nHi\n\n## Model\n\nHello\n\n*(interrupted)*" in text
    with pytest.raises(ConfigError, match=r"load the \.json one"):
        load(tmp_path / "chat.md")


def test_a_file_is_not_replaced_by_accident(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="/save! "):
        save(path, "Model", [])
    assert path.read_text() == "precious"
    save(path, "Model", [], overwrite=True)
    assert load(path) == []


def test_a_bare_list_of_messages_is_read_too(tmp_path):
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "Hi"}]')
    assert load(tmp_path / "m.json") == [Turn(role="user", content="Hi")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no saved conversation"),
        (b"\xff\xfe", "no saved conversation"),
        (b"[" * 100_000, "no saved conversation"),
        (b'{"format": "other", "model": "", "turns": []}', "format 'other'"),
        (b'[{"role": "robot", "content": "x"}]', "role"),
        (b'[{"role": "user"}]', "lacks content"),
        (b'[{"role": "user", "content": 3}]', "content"),
        (b'[{"role": "user", "content": "x", "mood": "good"}]', "mood"),
        (b'[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]', "only at the start"),
        (b"3", "no saved conversation"),
    ],
)
def test_a_file_that_is_no_conversation_says_so(tmp_path, content, says):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load(path)


@pytest.mark.parametrize("place", ["missing/chat.json", "."])
def test_places_that_cannot_be_written_say_so(tmp_path, place):
    with pytest.raises(ConfigError, match=r"cannot write|is a folder"):
        save(tmp_path / place, "Model", [])


def test_missing_files_say_so(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.json")


def test_the_file_is_plain_to_read_for_others(tmp_path):
    save(tmp_path / "c.json", "Model", [Turn(role="user", content="中")])
    data = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert data["turns"][0]["content"] == "中"
    assert data["format"] == "ernie45-conversation-1"
