"""Talk with a model: at a terminal, once with `--prompt`, or through a pipe.

ernie chat                                  a conversation with the starter model
ernie chat FOLDER --prompt "Why is ..."     one answer
cat letter.txt | ernie chat | less          the prompt from standard input, plain text out
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol, TextIO

import tyro

from ernie45.config import Environment
from ernie45.engine.speculate import DRAFT_TOKENS
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.errors import ConfigError, RequestError
from ernie45.recipes.answer import AnswerView, Piece, Reply, Speaker, headline, resources, summary
from ernie45.recipes.conversation import Turn, fit
from ernie45.recipes.session import Session, terminal_size
from ernie45.recipes.speaker import open_speaker
from ernie45.recipes.terminal import Style, clean, hidden_cursor, quiet_keyboard

_OWN = tyro.conf.arg(help_behavior_hint="(default: what the model's folder recommends)")
_NONE = tyro.conf.arg(help_behavior_hint="")


class SamplingFlags(Protocol):
    """The flags by which a person chooses how words are chosen; None = not said."""

    @property
    def max_tokens(self) -> int | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ThreadSettings):
    """Talk with a model in the terminal, ask it once with --prompt, or pipe a prompt in: `echo hi | ernie chat`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """A model folder, a GGUF file, a Hub name, or `starter`: a small chat model that needs no download of gigabytes."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """Answer this and leave."""
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """System message: how the model is to behave."""
    thinking: Annotated[str | None, tyro.conf.arg(metavar="on|off|N", help_behavior_hint="(default: the model's own habit)")] = None
    """Reasoning before the answer; a number allows so many tokens of it."""
    max_tokens: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: what fits into the context)")] = None
    """Longest answer in tokens."""
    temperature: Annotated[float | None, _OWN] = None
    """How freely to choose words; 0 always takes the likeliest."""
    top_p: Annotated[float | None, _OWN] = None
    """Choose among the likeliest tokens that together have this probability."""
    top_k: Annotated[int | None, _OWN] = None
    """Choose among so many likeliest tokens; 0 is off."""
    min_p: Annotated[float | None, _NONE] = None
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: Annotated[float | None, _OWN] = None
    """Above 1 makes words that were used less likely."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: a new one each time)")] = None
    """The same seed gives the same answer."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """A PEFT adapter that the model answers with."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Show the model this image, in front of the (first) prompt."""
    video: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE", help_behavior_hint="(repeatable)")] = ()
    """Show the model this video, in front of the (first) prompt."""
    text_only: bool = False
    """Leave what a vision-language model sees with in its files: less memory, no pictures."""
    json: bool = False
    """Print one JSON object: text, reasoning, tokens, timing, settings. Needs --prompt or a pipe."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto takes the one this processor is fast at."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME", help_behavior_hint="")] = None
    """Round the matrices as they are loaded: w4a8, w8a8, w4a16 or w8a16. Done anew at each start; `ernie quantize` loses less."""
    kv: Literal["whole", "int8", "int4"] = "whole"
    """Keys and values in the cache: in the compute type, or of 8 or 4 bits."""
    speculative: Literal["off", "ngram", "draft", "mtp"] = "off"
    """Guess tokens ahead and verify them in one step; answers stay the same. ngram: from prompt and answer; draft: by --draft-model;
    mtp: by the model's own prediction block."""
    draft_model: Annotated[str | None, _NONE] = None
    """A smaller model of the same vocabulary that guesses, for speculative draft."""
    draft_tokens: int = DRAFT_TOKENS
    """Tokens guessed ahead in one step, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        thinking_of(self.thinking)
        if self.text_only and (self.image or self.video):
            raise ConfigError("--text-only loads a model without its eyes: leave --image and --video out, or --text-only")
        for name in ("prompt", "system"):
            _check_text(getattr(self, name), f"--{name}")


def thinking_of(word: str | None) -> bool | int | None:
    """`on`, `off` or a token budget as the engine takes it. Raises `ConfigError` for anything else."""
    if word is None or word in ("on", "off"):
        return None if word is None else word == "on"
    if word.isascii() and word.isdigit():
        return int(word)
    raise ConfigError(f"--thinking is '{clean(word)}'; say on, off, or a number of tokens")


def sampling_settings(config: SamplingFlags, folder: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields for `SamplingParams`: flags win over `folder`, the content of generation_config.json; both over 0.8 and 0.8."""
    settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.8}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    advice = {name: folder[name] for name in names if folder.get(name) is not None}
    if advice or "do_sample" in folder:  # a file that holds token ids only gives no advice
        settings = advice
        if folder.get("do_sample") is False:
            settings["temperature"] = 0.0
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return settings


def run(config: ChatConfig, environment: Environment) -> int:
    """Open the model and answer: once when there is a prompt, else for as long as the person likes. Returns the exit code."""
    interactive = config.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if config.json and config.prompt is None and sys.stdin.isatty():
        raise ConfigError("--json answers one prompt: give --prompt TEXT, or pipe it in: echo hi | ernie chat --json")
    prompt = "" if interactive else read_prompt(config.prompt, sys.stdin)
    speaker = open_speaker(
        config.model,
        environment,
        dtype=config.dtype,
        quantize=config.quantize,
        kv=config.kv,
        speculative=config.speculative,
        draft_model=config.draft_model,
        draft_tokens=config.draft_tokens,
        thinking=thinking_of(config.thinking),
        sampling=lambda folder: sampling_settings(config, folder),
        chat=interactive,
        adapter=config.adapter,
        text_only=config.text_only,
        threads=config,
    )
    turns = [Turn(role="system", content=config.system)] if config.system else []
    if interactive:
        session = Session(speaker, environment, max_tokens=config.max_tokens, turns=turns)
        for kind, names in (("image", config.image), ("video", config.video)):
            for name in names:
                session.show(kind, name)
        return session.run()
    turns.append(Turn(role="user", content=prompt, images=config.image, videos=config.video))
    if not config.json:  # there the settings are part of the object
        for line in (f"{speaker.name} · {headline(speaker)}", *resources(speaker.settings())):
            print(Style.of(sys.stderr, environment).dim(clean(line)), file=sys.stderr)
    fitted = fit(turns, speaker.count, speaker.limit, config.max_tokens)
    reply = speaker.reply(fitted.turns)
    try:
        if config.json:
            print_json(reply, speaker, sys.stdout)
        elif config.prompt is not None and sys.stdout.isatty():
            print_live(reply, speaker, fitted.tokens, environment, sys.stdout)
        else:
            print_plain(reply, sys.stdout)
    finally:
        reply.close()
    return 0


def read_prompt(text: str | None, stream: TextIO) -> str:
    """The prompt from the flag, else all of standard input. Raises `RequestError` when it is empty or not UTF-8."""
    if text is None:
        if stream.isatty():
            print("Type the prompt; Ctrl-D on an empty line ends it.", file=sys.stderr)
        data = stream.buffer.read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"standard input is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}; "
                "convert it first, for example with `iconv -f latin1 -t utf-8`",
                field="prompt",
            ) from None
    text = text.rstrip("\r\n")
    if not text.strip():
        raise RequestError('the prompt is empty; try `ernie chat --prompt "Hello"` or `echo Hello | ernie chat`', field="prompt")
    return text


def print_plain(reply: Reply, stream: IO[str]) -> None:
    """The answer as it comes, and nothing else."""
    last = ""
    for piece in reply:
        text = clean(piece.text) if piece.kind == "content" else ""
        text = text if last else text.lstrip("\n")
        if text:
            stream.write(text)
            stream.flush()
            last = text
    if not last.endswith("\n"):
        stream.write("\n")


def print_live(reply: Reply, speaker: Speaker, prompt_tokens: int, environment: Environment, stream: IO[str]) -> None:
    """The answer as drawn Markdown with its numbers below, for one prompt at a terminal."""
    view = AnswerView(stream, Style.of(stream, environment), terminal_size)
    done = False
    with quiet_keyboard(), hidden_cursor(stream):
        view.waiting(prompt_tokens)
        try:
            for piece in reply:
                view.push(piece)
            done = True
        finally:
            reply.close()
            view.finish([summary(reply.outcome, speaker.limit, interrupted=not done)])


def print_json(reply: Reply, speaker: Speaker, stream: IO[str]) -> None:
    """One JSON object on one line. Control characters of the C1 block are escaped too: a terminal may show this."""
    pieces: list[Piece] = list(reply)
    outcome = reply.outcome
    data = {
        "model": speaker.name,
        "text": "".join(piece.text for piece in pieces if piece.kind == "content"),
        "reasoning": "".join(piece.text for piece in pieces if piece.kind == "reasoning"),
        "tool_calls": [dict(call) for call in outcome.tool_calls],
        "finish_reason": outcome.finish_reason,
        "prompt_tokens": outcome.prompt_tokens,
        "answer_tokens": outcome.answer_tokens,
        "timing": {
            "first_token_s": outcome.first_token_s,
            "total_s": outcome.total_s,
            "tokens_per_second": outcome.tokens_per_second,
        },
        "settings": speaker.settings(),
    }
    text = json.dumps(data, ensure_ascii=False)
    stream.write("".join(f"\\u{ord(c):04x}" if clean(c) != c else c for c in text) + "\n")


def _check_text(text: str | None, flag: str) -> None:
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{flag} is not UTF-8; this terminal or script writes another encoding") from None
