"""The command line: words, flags, config files, exit codes."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from ernie45 import cli
from ernie45.cli import WORDS, flags_of, main, read_config
from ernie45.errors import CheckpointError, ConfigError, ErnieError


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A section."""

    page_size: int = 16
    """Tokens per page."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do a thing."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Which model."""
    top_p: float | None = None
    """A share."""
    dtype: Literal["auto", "float32"] = "auto"
    """A type."""
    json: bool = False
    """As JSON."""
    engine: Engine = field(default_factory=Engine)


def ernie(*arguments, **options):
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "ernie45", *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_word_by_group(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text and entry.summary in text for word, entry in WORDS.items())
    assert max(map(len, text.splitlines())) <= 100


def test_help_is_quick():
    def seconds():
        before = os.times()
        assert ernie("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Processor time, and the best of several: how busy the machine is does not count.
    assert min(seconds() for _ in range(8)) < 0.15


def test_words_of_two_parts_are_listed_by_their_first(capsys):
    for arguments in (["bench", "--help"], ["help", "bench"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("ernie bench ")


@pytest.mark.parametrize("word", sorted(WORDS))
def test_every_word_explains_each_of_its_options(capsys, word):
    assert main(["help", *word.split()]) == 0
    text = capsys.readouterr().out
    module = __import__(WORDS[word].module, fromlist=["run"])
    config = getattr(module, WORDS[word].config)
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert callable(module.run)
    positional = {"--model", "--models", "--path", "--runs", "--shape", "--url"} | ({"--data"} if word.startswith("data") else set())
    for flag, _ in flags_of(config):
        section, _, name = flag.rpartition(".") if "." in flag else ("--", "", flag[2:])
        off = f"{section}.no-{name}" if "." in flag else f"--no-{name}"  # a switch that is on is shown by what turns it off
        assert flag in positional or flag in text or off in text, flag


def test_the_version_is_said(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ernie45 ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chta"], "did you mean 'chat'"),
        (["help", "modles"], "did you mean 'models'"),
        (["--verson"], "takes a word first"),
        (["chat", "--temprature", "1"], "did you mean '--temperature'"),
        (["chat", "--temprature=1"], "did you mean '--temperature'"),
        (["chat", "--temperature", "warm"], "warm"),
        (["chat", "--temperature"], "--temperature needs a value"),
        (["chat", "--prompt", "--json"], "--prompt needs a value"),
        (["chat", "--dtype", "float23"], "float23"),
        (["chat", "one", "two"], "two"),
        (["chat", "--thinking", "perhaps", "--prompt", "x"], "on, off, or a number"),
        (["inspect"], "folder"),
        (["bench"], "`ernie bench` takes one more word: latency, serve, make"),
        (["bench", "lateny"], "takes one more word"),
        (["bench", "make", "--shceme", "w4a8"], "did you mean '--scheme'"),
        (["chat", "--config"], "--config needs a YAML file"),
        (["chat", "--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_2(capsys, arguments, says):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ernie: ")
    assert says in err
    assert "Traceback" not in err
    assert "│" not in err
    assert len(err.splitlines()) == 1


def test_flags_win_over_the_config_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: folder\ntop_p: 1e-1\nengine:\n  page_size: 32\n")
    assert read_config("x", Config, ["--config", str(path)]) == Config(model="folder", top_p=0.1, engine=Engine(page_size=32))
    assert read_config("x", Config, [f"--config={path}", "--engine.page-size", "8"]).engine.page_size == 8
    assert read_config("x", Config, ["other", "--config", str(path), "--top_p", "1"]) == Config(
        model="other", top_p=1.0, engine=Engine(page_size=32)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("engine:\n  page_sise: 3", "x.engine.page_sise is not a setting; did you mean 'page_size'"),
        ("top_p: warm", "x.top_p must be float"),
        ("top_p: 1\ntop_p: 2", "line 2: 'top_p' is set twice"),
        ("- a", "table of settings"),
        ("a: [", "is no YAML"),
        ("model: !!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_a_config_file_is_read_strictly(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config("x", Config, ["--config", str(path)])
    assert says in str(caught.value)


def test_an_empty_config_file_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    assert read_config("x", Config, ["--config", str(tmp_path / "c.yaml")]) == Config()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (CheckpointError("the folder \x1b[31m is no model"), 2, "ernie: the folder ␛[31m is no model\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_become_exit_codes(monkeypatch, capsys, error, code, says):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert main([]) == code
    assert says in capsys.readouterr().err


def test_a_failure_of_ours_is_not_hidden(monkeypatch):
    def fail(args):
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(AssertionError):
        main([])
    assert not issubclass(AssertionError, ErnieError)


def test_a_reader_that_leaves_early_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run([sys.executable, "-m", "ernie45", "models"], stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_locale_without_the_letters_still_prints():
    done = ernie("models", env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr


def test_no_colour_when_asked_or_piped():
    assert "\x1b" not in ernie("models").stdout
    assert "\x1b" not in ernie("inspect", "nowhere").stderr


def test_a_switch_that_is_on_can_be_turned_off(capsys):
    """It reaches the recipe, which then says what is wrong with the folder."""
    assert main(["quantize", "no/such/model", "--no-hadamard", "--out", "nowhere"]) != 0
    said = capsys.readouterr().err
    assert "no option" not in said
    assert "no/such/model" in said
