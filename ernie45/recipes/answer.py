"""An answer on its way from the model to a reader: its pieces, what it came to, and how it looks on a screen while it grows."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol

from ernie45.recipes.conversation import Turn
from ernie45.recipes.markdown import WIDEST, MarkdownLines
from ernie45.recipes.terminal import LiveLines, Style, clean

# A frame costs about 3 ms; 20 of them a second look continuous.
FRAME_SECONDS = 0.05
# Thinking is shown through a window of so many lines and folded into one when the answer begins.
THINKING_LINES = 5


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. An empty piece says that a step was made and nothing is to be shown yet."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an answer came to. Times in seconds from the moment of asking; `first_token_s` is None when there was no token."""

    prompt_tokens: int
    answer_tokens: int
    finish_reason: str
    first_token_s: float | None
    total_s: float
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token, None when there was no second one."""
        if self.first_token_s is None or self.answer_tokens < 2 or self.total_s <= self.first_token_s:
            return None
        return (self.answer_tokens - 1) / (self.total_s - self.first_token_s)


class Reply(Protocol):
    """An answer being made: iterate over its pieces, then ask for `outcome`. `close()` stops it early and frees what it holds."""

    def __iter__(self) -> Iterator[Piece]: ...

    def close(self) -> None: ...

    @property
    def outcome(self) -> Outcome: ...


class Speaker(Protocol):
    """A model that answers conversations."""

    name: str
    limit: int
    """Tokens of context: prompt and answer together."""

    def count(self, turns: Sequence[Turn]) -> int:
        """Tokens of the prompt that `turns` make."""

    def reply(self, turns: Sequence[Turn], retry: int = 0) -> Reply:
        """Begin an answer; `retry` counts how often this one was asked for again, so that a fixed seed does not repeat itself."""

    def settings(self) -> dict[str, str]:
        """What was resolved: compute type, sampling, memory; for people to read."""


def headline(speaker: Speaker) -> str:
    """What was resolved when the model was opened, in one line."""
    settings = speaker.settings()
    parts = [settings[name] for name in ("compute", "kernels") if name in settings]
    return " · ".join([*parts, f"context {speaker.limit:,} tokens"])


def resources(settings: Mapping[str, str]) -> list[str]:
    """Lines that say on which threads a model computes, what memory it takes and what was left in its files."""
    return [f"{name}: {settings[name]}" for name in ("threads", "memory", "unseen") if name in settings]


def summary(outcome: Outcome, limit: int, interrupted: bool) -> str:
    """The line under an answer: tokens, speed, delay, and how much of the context of `limit` tokens is used."""
    parts = [f"{outcome.answer_tokens:,} token{'s' * (outcome.answer_tokens != 1)}"]
    if outcome.tokens_per_second:
        parts.append(f"{outcome.tokens_per_second:.1f} tokens/s")
    if outcome.first_token_s is not None:
        parts.append(f"first after {outcome.first_token_s:.2f} s")
    parts.append(f"context {outcome.prompt_tokens + outcome.answer_tokens:,} of {limit:,}")
    if interrupted:
        parts.insert(0, "stopped")
    elif outcome.finish_reason == "length":
        parts.insert(0, "cut at the token limit")
    return " · ".join(parts)


class AnswerView:
    """An answer on a terminal, redrawn in place as it grows."""

    def __init__(
        self, stream: IO[str], style: Style, size: Callable[[], tuple[int, int]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._live = LiveLines(stream, size)
        self._style, self._size, self._clock = style, size, clock
        self._markdown = MarkdownLines(color=style.color)
        self._reasoning = ""
        self._has_content = False
        self._began = clock()
        self._thought_s = 0.0
        self._drawn = float("-inf")

    def waiting(self, prompt_tokens: int) -> None:
        """Say that the prompt is being read."""
        self._live.show([self._style.dim(f"reading {prompt_tokens:,} tokens …")])

    def push(self, piece: Piece) -> None:
        """Take a piece; draws at most every `FRAME_SECONDS`."""
        text = clean(piece.text)
        if not text:
            return
        if piece.kind == "reasoning":
            self._reasoning += text
            self._thought_s = self._clock() - self._began
        else:
            self._markdown.push(text if self._has_content else text.lstrip("\n"))
            self._has_content = True
        if self._clock() - self._drawn >= FRAME_SECONDS:
            self._draw()

    def finish(self, notes: list[str]) -> None:
        """Draw the answer a last time with `notes` under it, and let it stand."""
        self._draw(notes)
        self._live.leave()

    def _draw(self, notes: list[str] | None = None) -> None:
        columns = self._size()[0]
        lines = self._thinking(columns, folded=self._has_content or notes is not None)
        if self._has_content:
            lines += self._markdown.lines(columns)
        for note in notes or []:
            lines += ["", *(self._style.dim(part) for part in _wrap(note, columns))]
        self._live.show(lines)
        self._drawn = self._clock()

    def _thinking(self, columns: int, folded: bool) -> list[str]:
        if not self._reasoning.strip():
            return []
        if folded:
            words = len(self._reasoning.split())
            return [self._style.dim(f"▸ thought for {self._thought_s:.1f} s, {words:,} words; /reasoning shows them"[: columns - 1]), ""]
        lines = _wrap(self._reasoning, min(columns, WIDEST) - 2)[-THINKING_LINES:]
        return [self._style.dim("▾ thinking"), *(self._style.dim("  " + line) for line in lines)]


def _wrap(text: str, columns: int) -> list[str]:
    """`text` in lines of at most `columns` cells."""
    from rich.console import Console
    from rich.text import Text

    width = max(columns, 10)
    return [line.plain.rstrip() for line in Text(text.strip("\n"), tab_size=4).wrap(Console(width=width), width, overflow="fold")]
