"""How many tokens to draft for whom, learned from what drafts brought and what steps cost. No tensors here.

Speculative decoding lets a step compute a request's next token and, behind it, tokens that somebody guessed cheaply. Each guess that turns
out to be what would have been chosen anyway is an answer token that cost no step of its own; the first wrong one ends the run. Nothing is
approximate: `verify` chooses every token as it would have been chosen alone.

The way through the engine: `Speculation.lengths` says how much is worth while -> `Scheduler.plan` finds room for it -> the runner asks a
`Drafter` for tokens, computes them beside the others and verifies them -> `Scheduler.commit` keeps the right ones and takes the pages of
the others back -> `Speculation.note` learns.

A step's time is taken as a + b x rows, fitted over recent steps that only decode. If each draft of a request is right with probability p,
its n-th brings p^n tokens and costs b and the drafting. So drafts are worth while, the best first, as long as one raises the tokens per
second of the whole step; when none does, nobody drafts, but for a try now and then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from ernie45.engine.scheduler import Plan
from ernie45.errors import ConfigError

SPECULATIVE = ("off", "ngram", "draft", "mtp")
DRAFT_TOKENS = 7  # a step of up to eight rows streams packed weights once (`kFewRows` of the kernels)
MOST_DRAFT_TOKENS = 64
_FORGET = 0.97  # weight of the past after each step, in the fit of its time
_FADE = 0.8  # and after each draft, in the share of a request's drafts that were right
_HOPE = (1.4, 2.0)  # a new request: as if 1.4 of 2 drafts had been right
_TRY = 24  # a request that does not draft tries once in so many steps
_TRIED = 2


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """Who drafts, and how much at most. Raises `ConfigError`.

    by           off; ngram: the text itself; draft: a smaller model; mtp: the model's own multi-token prediction block
    draft_model  the smaller model: folder, file or name
    most         drafted tokens of a request in one step
    """

    by: str = "off"
    draft_model: str | None = None
    most: int = DRAFT_TOKENS

    def __post_init__(self) -> None:
        if self.by not in SPECULATIVE:
            raise ConfigError(f"speculative is '{self.by}'; allowed: {', '.join(SPECULATIVE)}")
        if isinstance(self.most, bool) or not isinstance(self.most, int) or not 1 <= self.most <= MOST_DRAFT_TOKENS:
            raise ConfigError(f"draft_tokens must be from 1 to {MOST_DRAFT_TOKENS}, not {self.most!r}; to draft none say speculative off")
        if self.by == "draft" and not self.draft_model:
            raise ConfigError("speculative draft needs draft_model, a smaller model with the same vocabulary")
        if self.draft_model and self.by != "draft":
            raise ConfigError(f"draft_model is given, but speculative is '{self.by}': say speculative draft, or leave draft_model out")

    def text(self) -> str:
        """For people."""
        sources = {"ngram": "the text itself", "draft": str(self.draft_model), "mtp": "the model's own prediction block"}
        return "none" if self.by == "off" else f"up to {self.most} tokens from {sources[self.by]}, where it pays"


def check_mtp(config: SpeculationConfig, quantize: str | None) -> None:
    """Raises `ConfigError` when a model that is packed as it is loaded is to guess with its prediction block, which is left out then."""
    if config.by == "mtp" and quantize is not None:
        raise ConfigError(
            f"--quantize {quantize} leaves the multi-token prediction block out: leave --quantize out, or take speculative ngram"
        )


@dataclass(slots=True)
class StepTime:
    """Seconds of a step as a + b x rows: least squares in which what is long past counts less."""

    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_rows: float = 0.0
    rows_seconds: float = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """One step. One that took far longer than expected says more about the machine than about the step."""
        base, slope = self.line()
        if self.weight > 1.0:
            seconds = min(seconds, 3.0 * (base + slope * rows))
        for name, value in (
            ("weight", 1.0),
            ("rows", rows),
            ("seconds", seconds),
            ("rows_rows", rows**2),
            ("rows_seconds", rows * seconds),
        ):
            setattr(self, name, getattr(self, name) * _FORGET + value)

    def line(self) -> tuple[float, float]:
        """a and b; with steps of one size alone, a row is taken as a tenth of them."""
        if not self.weight:
            return 1.0, 0.1
        rows, seconds = self.rows / self.weight, self.seconds / self.weight
        spread = self.rows_rows / self.weight - rows**2
        slope = (self.rows_seconds / self.weight - rows * seconds) / spread if spread > 0.05 else 0.1 * seconds / rows
        slope = min(max(slope, 0.01 * seconds / rows), seconds / rows)
        return seconds - slope * rows, slope


@dataclass(slots=True)
class _Past:
    """One request's drafts: `right` of `tried` (fading), and steps since it drafted last."""

    right: float = _HOPE[0]
    tried: float = _HOPE[1]
    idle: int = 0
    begun: bool = False


class Speculation:
    """What was learned about requests and steps."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pasts: dict[str, _Past] = {}
        self._time = StepTime()
        self._drafting = 0.0  # seconds per drafted token

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._pasts.pop(request_id, None)

    def lengths(self, decoding: Sequence[str]) -> dict[str, int]:
        """How many drafted tokens are worth while for each of the requests that decode; those with none are left out."""
        if not decoding:
            return {}
        base, slope = self._time.line()
        each = slope + self._drafting
        tokens, seconds = float(len(decoding)), base + slope * len(decoding)
        lengths = dict.fromkeys(decoding, 0)
        pasts = [self._pasts.setdefault(name, _Past()) for name in decoding]
        chances = [(-past.right / past.tried, name) for past, name in zip(pasts, decoding, strict=True)]
        heapify(chances)
        while True:
            gain, name = chances[0]
            if -gain * seconds <= tokens * each or lengths[name] == self._most:
                break
            tokens, seconds = tokens - gain, seconds + each
            lengths[name] += 1
            past = self._pasts[name]
            heapreplace(chances, (gain * past.right / past.tried if lengths[name] < self._most else 0.0, name))
        for past, name in zip(pasts, decoding, strict=True):
            if not lengths[name] and past.idle >= _TRY:
                lengths[name] = min(_TRIED, self._most)
        return {name: count for name, count in lengths.items() if count}

    def note(self, plan: Plan, drafted: Mapping[str, int], accepted: Mapping[str, int], seconds: float, drafting: float) -> None:
        """What a step brought. seconds: without the drafting, which took `drafting`."""
        fresh = False
        for row in plan.rows:
            past = self._pasts.get(row.request_id)
            if past is None:
                continue
            if not (count := drafted.get(row.request_id, 0)):
                past.idle += 1
                continue
            right = accepted.get(row.request_id, 0)
            fresh |= not past.begun
            past.idle, past.begun = 0, True
            past.right = past.right * _FADE + right
            past.tried = past.tried * _FADE + min(right + 1, count)
        if all(row.samples and len(row.tokens) == 1 for row in plan.rows):
            self._time.note(len(plan.rows) + sum(drafted.values()), seconds)
        if drafted and not fresh:  # before its first draft a text is read
            each = drafting / sum(drafted.values())
            self._drafting = each if not self._drafting else self._drafting * _FORGET + each * (1 - _FORGET)
