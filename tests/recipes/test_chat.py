"""One answer through a pipe, as text or JSON: what is read, what is written, and nothing else."""

import io
import json

import pytest

from ernie45.errors import ConfigError, RequestError
from ernie45.recipes import chat
from ernie45.recipes.chat import ChatConfig, read_prompt, sampling_settings, thinking_of


class Input(io.TextIOWrapper):
    """Standard input with the given bytes."""

    def __init__(self, data, terminal=False):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self):
        return self._terminal


@pytest.fixture
def ask(monkeypatch, capsys, environment, ScriptSpeaker):
    def run(speaker_script, data=b"", terminal=False, reasoning="", **settings):
        speaker = ScriptSpeaker(speaker_script, reasoning=reasoning)
        monkeypatch.setattr("sys.stdin", Input(data, terminal))
        monkeypatch.setattr(chat, "open_speaker", lambda model, environment, **settings: speaker)
        code = chat.run(ChatConfig(**settings), environment)
        assert code == 0
        return capsys.readouterr().out, speaker

    return run


def test_a_pipe_gets_the_plain_text_and_nothing_else(ask):
    out, speaker = ask("# Hi **there**", b"hello\n", reasoning="let me see")
    assert out == "# Hi **there**\n"
    assert [turn.content for turn in speaker.asked[0]] == ["hello"]
    assert speaker.replies[0].closed


def test_a_whole_text_with_its_line_ends_is_one_prompt(ask):
    _, speaker = ask("ok", "a\n\nb 中 🎉\n\n".encode(), system="be brief")
    assert [(t.role, t.content) for t in speaker.asked[0]] == [("system", "be brief"), ("user", "a\n\nb 中 🎉")]


def test_the_flag_wins_and_leaves_standard_input_alone(ask):
    _, speaker = ask("ok", b"not this", prompt="this")
    assert speaker.asked[0][-1].content == "this"


def test_escape_sequences_do_not_pass(ask):
    out, _ = ask("a \x1b[2Jb", b"x")
    assert out == "a ␛[2Jb\n"


def test_json_is_one_object_on_one_line(ask):
    out, _ = ask("Hi \x1b[2J \x9b 中", b"hello there", json=True, reasoning="why not")
    assert out.count("\n") == 1
    assert "中" in out
    assert "\x9b" not in out
    data = json.loads(out)
    assert data["text"].split() == ["Hi", "\x1b[2J", "\x9b", "中"] or data["text"] == " Hi \x1b[2J \x9b 中".strip()
    assert data["reasoning"] == "why not"
    assert data["prompt_tokens"] == 2
    assert data["answer_tokens"] > 4
    assert data["finish_reason"] == "stop"
    assert data["tool_calls"] == []
    assert set(data["timing"]) == {"first_token_s", "total_s", "tokens_per_second"}
    assert data["settings"] == {"compute type": "none"}


@pytest.mark.parametrize("data", [b"", b"\n", b"  \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_prompt_is_refused(data):
    with pytest.raises(RequestError, match="the prompt is empty"):
        read_prompt(None, Input(data))


def test_an_empty_flag_is_refused():
    with pytest.raises(RequestError, match="the prompt is empty"):
        read_prompt("", Input(b"hello"))


def test_a_prompt_that_is_not_utf8_is_refused_with_the_place():
    with pytest.raises(RequestError, match=r"byte 0xe9 at position 3; .*iconv"):
        read_prompt(None, Input("caf\u00e9".encode("latin-1")))


def test_arguments_that_are_not_utf8_are_refused():
    with pytest.raises(ConfigError, match="--prompt is not UTF-8"):
        ChatConfig(prompt="caf\udce9")


def test_json_without_a_prompt_says_what_to_do(ask):
    with pytest.raises(ConfigError, match="--prompt TEXT"):
        ask("x", terminal=True, json=True)


@pytest.mark.parametrize(("word", "means"), [(None, None), ("on", True), ("off", False), ("0", 0), ("512", 512)])
def test_thinking_is_a_switch_or_a_budget(word, means):
    found = thinking_of(word)
    assert found == means
    assert type(found) is type(means)


@pytest.mark.parametrize("word", ["-1", "maybe", "", "٣", "1.5"])
def test_other_words_for_thinking_are_refused(word):
    with pytest.raises(ConfigError, match="on, off, or a number"):
        thinking_of(word)


def test_sampling_comes_from_flags_then_the_folder_then_the_house():
    assert sampling_settings(ChatConfig(), {}) == {"temperature": 0.8, "top_p": 0.8}
    assert sampling_settings(ChatConfig(), {"eos_token_id": 2}) == {"temperature": 0.8, "top_p": 0.8}
    folder = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 2, "frequency_penalty": 0.0}
    assert sampling_settings(ChatConfig(), folder) == {"temperature": 0.6, "top_p": 0.95, "frequency_penalty": 0.0}
    assert sampling_settings(ChatConfig(temperature=0.0, seed=7), folder)["temperature"] == 0.0
    assert sampling_settings(ChatConfig(temperature=0.0, seed=7), folder)["seed"] == 7
    assert sampling_settings(ChatConfig(), {"do_sample": False, "temperature": 0.6})["temperature"] == 0.0
