"""Answer a file of prompts; killed and started again, it goes on where it was.

ernie generate --input prompts.jsonl --output answers.jsonl
ernie generate FOLDER --input prompts.jsonl --output answers.jsonl --max-tokens 200 --temperature 0
"""

import hashlib
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import tyro

from ernie45.config import Environment
from ernie45.engine.speculate import DRAFT_TOKENS
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.errors import DataError, RequestError, TokenizerError
from ernie45.recipes.answer import resources
from ernie45.recipes.chat import sampling_settings, thinking_of
from ernie45.recipes.speaker import read_generation_config
from ernie45.recipes.terminal import progress_bar

if TYPE_CHECKING:
    from ernie45.engine.client import LLM, Stream
    from ernie45.recipes.prompt_rows import BadRow, Row
    from ernie45.recipes.results import Results

_OWN = tyro.conf.arg(help_behavior_hint="(default: what the model's folder recommends)")
_NONE = tyro.conf.arg(help_behavior_hint="")
_TOLD_SECONDS = 10.0  # between two lines of progress where standard error is no terminal
_BAR = 24


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ThreadSettings):
    """Answer a file of prompts: JSON lines with `prompt`, `messages`, or lines of an OpenAI batch. Started again, it goes on."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """A model folder, a GGUF file, a Hub name, or `starter`."""
    input: Path
    """File with one JSON object a line."""
    output: Path
    """File for the answers, in the order of the input; until it is whole they are in OUTPUT.part."""
    skip_bad: bool = False
    """Answer the other rows when some are wrong; a wrong row's answer says what is wrong."""
    thinking: Annotated[str | None, tyro.conf.arg(metavar="on|off|N", help_behavior_hint="(default: the model's own habit)")] = None
    """Reasoning before the answers; a number allows so many tokens of it."""
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
    seed: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: a new one for each row)")] = None
    """The same seed gives the same answers."""
    chat_format: Annotated[str | None, _NONE] = None
    """A known chat format for a model without a template of its own."""
    max_running: int = 32
    """Rows that are answered at the same time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto takes the one this processor is fast at."""
    speculative: Literal["off", "ngram", "draft", "mtp"] = "off"
    """Guess tokens ahead and verify them in one step; answers stay the same. ngram: from prompt and answer; draft: by --draft-model;
    mtp: by the model's own prediction block."""
    draft_model: Annotated[str | None, _NONE] = None
    """A smaller model of the same vocabulary that guesses, for speculative draft."""
    draft_tokens: int = DRAFT_TOKENS
    """Tokens guessed ahead of an answer in one step, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        thinking_of(self.thinking)


def run(config: GenerateConfig, environment: Environment) -> int:
    """Returns 0 when every row was answered, 1 when some were skipped. Raises ErnieError subclasses."""
    from ernie45.recipes.results import Results

    digest = _digest(config.input)
    with progress_bar(environment) as progress:
        progress("starting", 0, 0)
        from ernie45.engine.client import LLM
        from ernie45.models.load import find_model

        path = find_model(config.model, environment, lambda stage: progress(stage, 0, 0))
        defaults = sampling_settings(config, read_generation_config(path))
        rows, bad = _read(config, defaults)
        asked = {
            "input": digest,
            "model": config.model,
            "thinking": config.thinking,
            "sampling": defaults,
            "chat format": config.chat_format,
        }
        with ExitStack() as stack:
            results = stack.enter_context(Results(config.output, asked))
            llm = LLM(
                path,
                dtype=config.dtype,
                max_running=config.max_running,
                speculative=config.speculative,
                draft_model=config.draft_model,
                draft_tokens=config.draft_tokens,
                chat_format=config.chat_format,
                threads=config,
                environment=environment,
                progress=lambda tensor, done, total: progress("loading weights", done, total),
            )
            keep = stack.pop_all()
    for line in resources(llm.settings()):
        print(line, file=sys.stderr)
    with keep:
        for row in bad:
            if row.number not in results.done:
                results.add(_error(row.number, row.id, row.field, row.text))
        skipped = len(bad) + _answer(llm, rows, results, config, Meter(len(rows) + len(bad), sys.stderr))
        results.finish()
    print(f"{config.output}: {len(rows) + len(bad) - skipped} answers, {skipped} rows skipped", file=sys.stderr)
    return 1 if skipped else 0


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(config: GenerateConfig, defaults: Mapping[str, Any]) -> "tuple[list[Row], list[BadRow]]":
    """All rows. Raises `DataError` naming the wrong ones, unless they are to be skipped."""
    from ernie45.recipes.prompt_rows import Row, read_rows

    rows: list[Row] = []
    bad = []
    for found in read_rows(config.input, defaults):
        if isinstance(found, Row):
            rows.append(found)
        else:
            bad.append(found)
    if bad and not config.skip_bad:
        more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0].named(config.input)}{more}; mend it, or pass over such rows with --skip-bad")
    if not rows and not bad:
        raise DataError(f"{config.input} holds no rows")
    return rows, bad


def _answer(llm: "LLM", rows: "list[Row]", results: "Results", config: GenerateConfig, meter: "Meter") -> int:
    """Answers what has no result, always so many rows at a time; how many could not be."""
    skipped = 0
    waiting = iter([row for row in rows if row.number not in results.done])
    meter.show(len(results.done))
    running: dict[int, tuple[Row, Stream]] = {}
    while True:
        while len(running) < 2 * config.max_running and (row := next(waiting, None)) is not None:
            try:
                running[row.number] = (row, _begun(llm, row, config))
            except (RequestError, TokenizerError) as error:
                if not config.skip_bad:
                    where = getattr(error, "field", None) or "messages"
                    raise DataError(
                        f"{config.input}:{row.number}, {where}: {error}; mend it, or pass over such rows with --skip-bad"
                    ) from None
                results.add(_error(row.number, row.id, getattr(error, "field", None), str(error)))
                skipped += 1
        if not running:
            meter.end(len(results.done))
            return skipped
        llm.step()
        for number in [number for number, (_, stream) in running.items() if stream.over]:
            row, stream = running.pop(number)
            done = _result(row, stream)
            results.add(done)
            meter.tokens += done["usage"]["completion_tokens"]
        meter.show(len(results.done))


def _begun(llm: "LLM", row: "Row", config: GenerateConfig) -> "Stream":
    from ernie45.engine.request import SamplingParams

    params = SamplingParams(**row.settings)
    if row.prompt is not None:
        return llm.stream_text(row.prompt, params)
    assert row.messages is not None
    return llm.stream(row.messages, params, thinking=thinking_of(config.thinking), tools=row.tools)


def _result(row: "Row", stream: "Stream") -> dict[str, Any]:
    done = stream.completion
    made: dict[str, Any] = {"line": row.number, "id": row.id, "text": done.text, "finish_reason": str(done.finish_reason)}
    if done.reasoning is not None:
        made["reasoning"] = done.reasoning
    if done.tool_calls:
        made["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in done.tool_calls]
    made["usage"] = {"prompt_tokens": done.prompt_tokens, "completion_tokens": len(done.token_ids), "cached_tokens": done.cached_tokens}
    made["usage"] |= {"accepted_tokens": done.accepted_tokens} if done.drafted_tokens else {}
    return made


def _error(number: int, id: str | int | None, field: str | None, text: str) -> dict[str, Any]:
    return {"line": number, "id": id, "error": {"field": field, "message": text}}


class Meter:
    """How far it is: a bar on a terminal, else a line now and then. tokens: that were written by this run."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.tokens = 0
        self._total = total
        self._stream = stream
        self._terminal = stream.isatty()
        self._began = time.monotonic()
        self._first: int | None = None
        self._told = -_TOLD_SECONDS

    def show(self, done: int) -> None:
        """Called as often as one likes."""
        now = time.monotonic() - self._began
        self._first = done if self._first is None else self._first
        if now - self._told < (0.1 if self._terminal else _TOLD_SECONDS):
            return
        self._told = now
        self._stream.write(("\r\x1b[K" if self._terminal else "") + self._line(done, now) + ("" if self._terminal else "\n"))
        self._stream.flush()

    def end(self, done: int) -> None:
        """The last word."""
        self._told = -_TOLD_SECONDS
        self.show(done)
        if self._terminal:
            self._stream.write("\n")

    def _line(self, done: int, seconds: float) -> str:
        parts = [f"{done:,} of {self._total:,} rows"]
        if self._terminal:
            full = _BAR * done // max(1, self._total)
            parts.insert(0, "█" * full + "·" * (_BAR - full))
        new = done - (self._first or 0)
        if self.tokens and seconds > 0:
            parts.append(f"{self.tokens / seconds:,.1f} tokens/s")
        if new and done < self._total:
            left = int(seconds / new * (self._total - done))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return "  ".join(parts)
