"""The command `ernie`: a table of words, each of which turns its flags into one frozen config and hands it to a recipe.

A recipe module has `run(config, environment) -> int` and a frozen config dataclass; its fields are the flags. The module is imported when
its word is typed and not before, so `ernie --help` costs no more than starting Python.
"""

import contextlib
import dataclasses
import io
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ernie45 import __version__
from ernie45.config import Environment, shorten_thread_waits
from ernie45.errors import ConfigError, ErnieError, did_you_mean

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Word:
    """One command: where its recipe lives, which class holds its settings, and what it does in one line. Some are two words long."""

    group: str
    module: str
    config: str
    summary: str


WORDS: dict[str, Word] = {
    "chat": Word("Talk", "ernie45.recipes.chat", "ChatConfig", "talk with a model in the terminal, or through a pipe"),
    "serve": Word("Talk", "ernie45.recipes.serve", "ServeConfig", "serve models over HTTP, with the protocols of OpenAI and Anthropic"),
    "generate": Word("Talk", "ernie45.recipes.generate", "GenerateConfig", "answer a file of prompts; killed, it goes on where it was"),
    "models": Word("Look", "ernie45.recipes.models", "ModelsConfig", "list every published model of the family, with sizes"),
    "inspect": Word("Look", "ernie45.recipes.inspect", "InspectConfig", "show what is in a model folder or file, and what is wrong there"),
    "quantize": Word("Make", "ernie45.recipes.quantize", "QuantizeConfig", "write a model with fewer bits, and measure what that costs"),
    "pretrain": Word("Learn", "ernie45.recipes.pretrain", "PretrainConfig", "learn from a corpus, from nothing or from a model"),
    "sft": Word("Learn", "ernie45.recipes.sft", "SftConfig", "teach a model from conversations: all weights, or adapters"),
    "align": Word("Learn", "ernie45.recipes.align", "AlignConfig", "teach a model to prefer the better of two answers"),
    "data preview": Word("Learn", "ernie45.recipes.data", "PreviewConfig", "show training rows as a model will see them"),
    "data check": Word("Learn", "ernie45.recipes.data", "CheckConfig", "read all training rows, and name the bad ones"),
    "convert-config": Word("Learn", "ernie45.recipes.convert_config", "ConvertConfig", "write an ERNIEKit run file as one of ours"),
    "watch": Word("Learn", "ernie45.recipes.watch", "WatchConfig", "show training runs on a web page while they learn"),
    "bench latency": Word(
        "Measure", "ernie45.recipes.bench.latency", "LatencyConfig", "how fast a model runs here, beside what the machine can do"
    ),
    "bench serve": Word("Measure", "ernie45.recipes.bench.serve", "BenchServeConfig", "how a server keeps up with many clients"),
    "bench make": Word("Measure", "ernie45.recipes.bench.make", "MakeConfig", "write a checkpoint of random weights in a published shape"),
    "export": Word("Make", "ernie45.recipes.export", "ExportConfig", "write a GGUF file for llama.cpp and its kin, or merge an adapter"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the answer is no, 2 a mistake in what was asked, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    shorten_thread_waits()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a letter must not end the program
            stream.reconfigure(errors="replace")
    try:
        code = dispatch(args)
        sys.stdout.flush()
        return code
    except ErnieError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head -1`), which is its right. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(args: Sequence[str]) -> int:
    """Find the word, build its config and run its recipe. Raises `ConfigError` for an unknown word, flag or value."""
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"ernie45 {__version__}")
        return 0
    asked_for_help = args[0] == "help"
    word, rest = split_word(args[1:] if asked_for_help else args)
    if not word:
        print(overview())
        return 0
    if asked_for_help:
        rest = ["--help"]
    if word.startswith("-"):
        raise ConfigError(f"ernie has no option {word}; it takes a word first, such as `ernie chat`; see `ernie --help`")
    kin = [name for name in WORDS if name.startswith(f"{word} ")]
    if kin and rest[:1] in (["-h"], ["--help"]):
        print("\n".join(f"ernie {name:<{max(map(len, kin))}}   {WORDS[name].summary}" for name in kin))
        return 0
    if kin:
        raise ConfigError(f"`ernie {word}` takes one more word: {', '.join(name.removeprefix(f'{word} ') for name in kin)}")
    if word not in WORDS:
        raise ConfigError(f"'{word}' is no command of ernie{did_you_mean(word, WORDS)}; see `ernie --help`")
    entry = WORDS[word]
    module = import_module(entry.module)
    config = read_config(word, getattr(module, entry.config), rest)
    if config is None:
        return 0
    return module.run(config, Environment.read())


def split_word(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command that `args` begin with, of two words or of one, and what follows it; an unknown first word stands for itself."""
    pair = " ".join(args[:2])
    return (pair, list(args[2:])) if pair in WORDS else (" ".join(args[:1]), list(args[1:]))


def overview() -> str:
    """The text of `ernie --help`: words by group."""
    lines = ["Run, adapt, compress and serve the ERNIE 4.5 family.", "", "usage: ernie WORD [OPTIONS]"]
    width = max(map(len, WORDS))
    for group in dict.fromkeys(entry.group for entry in WORDS.values()):
        lines += ["", group]
        lines += [f"  {word:<{width}}   {entry.summary}" for word, entry in WORDS.items() if entry.group == group]
    lines += ["", "`ernie help WORD` shows its options. `ernie chat` is the quickest start: it brings a small model."]
    return "\n".join(lines)


def read_config(word: str, cls: type, args: Sequence[str]) -> Any:
    """Build the config of a word from `--config FILE.yaml` and flags (flags win); None when help was asked for and printed.

    Raises `ConfigError` that names the flag or the setting.
    """
    import tyro  # 0.1 s: `ernie --help` does without it

    args, default = _take_config_file(word, cls, list(args))
    _check_flags(word, cls, args)
    options: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, prog=f"ernie {word}", args=args, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone), **options)
    except SystemExit as leaving:
        if not leaving.code:
            return None
        raise ConfigError(f"{_unboxed(complaint.getvalue())}; see `ernie help {word}`") from None


def flags_of(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every flag of a config class, nested ones as `section.field`, and whether it is a switch that takes no value."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name], name + ".")
        else:
            yield f"--{name}", hints[field.name] is bool


def _off(switch: str) -> str:
    """The flag that turns a switch off, for one that is on by default."""
    section, dot, name = switch.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{name}"


def _take_config_file(word: str, cls: type, args: list[str]) -> tuple[list[str], Any]:
    """Split `--config FILE` off the arguments; the second value is the config the file describes, or None."""
    for i, arg in enumerate(args):
        if arg == "--config" or arg.startswith("--config="):
            path = arg.partition("=")[2] if "=" in arg else (args[i + 1] if i + 1 < len(args) else "")
            if not path:
                raise ConfigError("--config needs a YAML file")
            from ernie45.recipes.settings import read_yaml

            return args[:i] + args[i + (1 if "=" in arg else 2) :], read_yaml(cls, path, word)
    return args, None


def _check_flags(word: str, cls: type, args: Sequence[str]) -> None:
    """Refuse a flag nobody knows with the nearest one, and a flag whose value is missing."""
    known = dict(flags_of(cls))
    off = {_off(name): True for name, switch in known.items() if switch}
    allowed = {**known, **off, "--help": True, "--config": False}
    for i, arg in enumerate(args):
        if arg == "--":
            return
        if not arg.startswith("--") or " " in arg:
            continue
        name, has_value, _ = arg.partition("=")
        name = name.replace("_", "-")
        if name not in allowed:
            raise ConfigError(f"`ernie {word}` has no option {name}{did_you_mean(name, allowed)}; see `ernie help {word}`")
        if not allowed[name] and not has_value and (i + 1 == len(args) or args[i + 1].split("=")[0] in allowed):
            raise ConfigError(f"{name} needs a value; see `ernie help {word}`")


def _unboxed(text: str) -> str:
    """The message inside a drawn box, as one line: the first paragraph, without frame and title."""
    lines = [line.strip("│ \t") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    words: list[str] = []
    for line in lines:
        if line.startswith(("─", "Got errors")) or (words and not line):
            break
        words.append(line)
    return " ".join(words).strip().rstrip(".") or "these options cannot be read"


def _complain(error: ErnieError) -> int:
    from ernie45.recipes.terminal import clean

    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(f"ernie: {clean(str(error))}", file=sys.stderr)
    return EXIT_MISTAKE
