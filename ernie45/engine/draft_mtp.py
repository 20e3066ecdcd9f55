"""Drafts from the model's own multi-token prediction block (`models.mtp`).

From the trunk's state of a place and the token that came next the block guesses the token after next; from its own state and that guess
the one behind, and so on (the block was trained for the first of these, so the others are less often right). It sees what it saw before
through keys and values of its own, in the places that the text has in the model's pages, and is shown every place of every text once, in
the step after the trunk computed it, when the next token is known. Of a text whose beginning was found in shared pages it has not seen
the place where its own part begins; that costs a little accuracy of guesses, and nothing else.

Letters: T tokens of a pass, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ernie45.engine.batch import BatchBuilder
from ernie45.engine.cache import PagedCache
from ernie45.engine.drafter import Guess, drafts_of, guessed
from ernie45.engine.sampler import SampleState
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.errors import ConfigError
from ernie45.models.text import Decoder


class MtpDrafter:
    """Guesses with a decoder's own block."""

    def __init__(self, decoder: Decoder, num_pages: int, page_size: int) -> None:
        """Raises `ConfigError` for a model without the block."""
        if decoder.mtp is None:
            raise ConfigError("this model has no multi-token prediction block, or was loaded without it: say speculative ngram, or draft")
        self._decoder = decoder
        self._cache = PagedCache(replace(decoder.config, num_layers=1, experts=None), num_pages, page_size, decoder.dtype)
        self._batches = BatchBuilder(page_size)
        self._states: dict[str, tuple[int, Tensor]] = {}  # the first place, and the trunk's states from there on

    def draft(self, rows: Sequence[PlanRow], states: Mapping[str, SampleState]) -> dict[str, tuple[int, ...]]:
        """As `Drafter.draft`; shows the block what the last step computed of each text."""
        parts: list[PlanRow] = []
        seen: list[Tensor] = []
        guesses: list[Guess] = []
        for row in rows:
            start, h_TD = self._states.get(row.request_id, (row.start, None))
            count = row.start - start  # drafted places beyond were wrong
            if h_TD is None or not 0 < count <= len(h_TD):
                continue
            state = states[row.request_id]
            following = (*state.request.prompt, *state.output)[start + 1 : row.start + 1]
            guesses_here = bool(row.room) and not state.request.pictures
            parts.append(replace(row, tokens=following, start=start + 1, samples=guesses_here))
            seen.append(h_TD[:count])
            if guesses_here:
                guesses.append(Guess(row, state.copy()))
        going = guesses
        while parts:
            m_RD = self._pass(parts, torch.cat(seen))
            if not going:
                break
            sampled = going
            going = guessed(going, self._decoder.logits(m_RD).float())
            seen = [m_RD[i : i + 1] for i, guess in enumerate(sampled) if guess in going]
            parts = [replace(g.row, tokens=(g.tokens[-1],), start=g.row.start + len(g.tokens), samples=True) for g in going]
        return drafts_of(guesses)

    def follow(self, rows: Sequence[PlanRow], hidden_TD: Tensor) -> None:
        """Keeps the trunk's states until the next tokens are known."""
        first = 0
        for row in rows:
            self._states[row.request_id] = row.start, hidden_TD[first : first + len(row.tokens)]
            first += len(row.tokens)

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._states.pop(request_id, None)

    def _pass(self, parts: Sequence[PlanRow], h_TD: Tensor) -> Tensor:
        """The block over all parts; its states at the ends of those that sample."""
        batch = self._batches.build(Plan(tuple(parts)))
        attend = self._cache.attend(batch)

        def alone(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
            return attend(0, q_TNH, k_TKH, v_TKH)  # whatever its number in the model, the block is the only layer of this cache

        m_TD = self._decoder.predict_after_next(batch.tokens_T, h_TD, batch.positions_T, alone)
        return m_TD[[span.end - 1 for part, span in zip(parts, batch.spans, strict=True) if part.samples]]
