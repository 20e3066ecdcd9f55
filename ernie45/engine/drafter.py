"""Who guesses the tokens that a step then verifies: the text itself here, models in `draft_model` and `draft_mtp`.

A wrong guess costs time and never correctness. Letters: T tokens of the step, R guesses under way, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ernie45.engine.ngram import SuffixIndex
from ernie45.engine.sampler import SampleState, sample
from ernie45.engine.scheduler import PlanRow


class Drafter(Protocol):
    """Told of every step's rows and of what became of them."""

    def draft(self, rows: Sequence[PlanRow], states: Mapping[str, SampleState]) -> dict[str, tuple[int, ...]]:
        """At most `room` tokens for each row that has room; who has none may be left out. Called before each step, also when none has room;
        a second time for the same rows when the step broke."""
        ...

    def follow(self, rows: Sequence[PlanRow], hidden_TD: Tensor) -> None:
        """The step was computed: the hidden states of `rows`, which hold their drafts, one row behind the other."""
        ...

    def forget(self, request_id: str) -> None:
        """A request is over."""
        ...


class NgramDrafter:
    """Guesses that a text goes on as it went on before: `SuffixIndex` over hint, prompt and answer of each request."""

    def __init__(self) -> None:
        self._texts: dict[str, SuffixIndex] = {}

    def draft(self, rows: Sequence[PlanRow], states: Mapping[str, SampleState]) -> dict[str, tuple[int, ...]]:
        """As `Drafter.draft`; a request is read when it first has room."""
        drafts = {}
        for row in rows:
            if not row.room:
                continue
            state = states[row.request_id]
            prompt = state.request.prompt
            text = self._texts.get(row.request_id)
            if text is None:
                text = self._texts[row.request_id] = SuffixIndex(state.request.prediction, prompt)
            text.extend(state.output[len(text) - len(prompt) :])
            if draft := text.draft(row.room):
                drafts[row.request_id] = draft
        return drafts

    def follow(self, rows: Sequence[PlanRow], hidden_TD: Tensor) -> None:
        """Nothing is learned of hidden states."""

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._texts.pop(request_id, None)


@dataclass(slots=True, eq=False)
class Guess:
    """A draft under way, made by a model: `state` is a copy of the request's that goes on with what is guessed."""

    row: PlanRow
    state: SampleState
    tokens: list[int] = field(default_factory=list)


def guessed(going: Sequence[Guess], logits_RV: Tensor) -> list[Guess]:
    """Draws each guess's next token from a model's float32 logits, which may be overwritten; those that have room for another.

    Drawn as the answer will be, with the number that belongs to the place: where the models are sure of the same tokens, they agree.
    """
    still = []
    for guess, token in zip(going, sample(logits_RV, [guess.state for guess in going]).tokens, strict=True):
        if token is None:
            continue
        guess.tokens.append(token)
        guess.state.append(token)
        if len(guess.tokens) < guess.row.room and not guess.state.ended:
            still.append(guess)
    return still


def drafts_of(guesses: Sequence[Guess]) -> dict[str, tuple[int, ...]]:
    """What was guessed for whom."""
    return {guess.row.request_id: tuple(guess.tokens) for guess in guesses if guess.tokens}
