"""Who guesses the tokens that a step then verifies: the text itself here, models in `draft_model` and `draft_mtp`.

A wrong guess costs time and never correctness. Letters: T tokens of the step, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ernie45.engine.ngram import SuffixIndex
from ernie45.engine.sampler import SampleState
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
