"""Runs one plan: embedding, decoder over the paged cache, logits of the rows that sample, the next tokens.

Letters: T tokens of the step, R rows that sample, D width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.engine.adapters import Adapters
from ernie45.engine.batch import Batch, BatchBuilder
from ernie45.engine.cache import PagedCache
from ernie45.engine.drafter import Drafter
from ernie45.engine.eyes import Eyes, Look
from ernie45.engine.grammar import Matcher
from ernie45.engine.output import TokenLogprobs
from ernie45.engine.packed_cache import PackedCache
from ernie45.engine.request import FinishReason, Request
from ernie45.engine.sampler import SampleState, score
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.engine.verify import Wanted, verify
from ernie45.models.native import native_network
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal

_SCORED_ROWS = 64  # prompt logits are made so many rows at a time: whole they would be gigabytes


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan brought: tokens per request that samples, how requests failed (`error` or `grammar`), log probabilities asked for.

    prompt_logprobs holds what this step adds: entries for prompt tokens in order, the first entry being for the second token.
    drafted says for whom how many tokens were guessed and verified, accepted how many of them were right; guessing took so many seconds.
    A failed request may have tokens.
    """

    sampled: dict[str, tuple[int, ...]]
    failed: dict[str, FinishReason]
    logprobs: dict[str, tuple[TokenLogprobs, ...]]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    drafting: float = 0.0


class _Computed(NamedTuple):
    """Hidden states of all rows, float32 logits of those that sample, and where native code found them, their best tokens and logits.

    No logits where the best are all that is wanted, and were found without them.
    """

    hidden_TD: Tensor
    logits_RV: Tensor | None
    best: tuple[Tensor, Tensor] | None


def merged(results: Sequence[StepResult], broken: Iterable[str]) -> StepResult:
    """The results of a plan's rows as the plan's result; `broken` are rows that have none."""
    whole = StepResult({}, dict.fromkeys(broken, FinishReason.error), {}, {})
    for result in results:
        whole.failed.update(result.failed)
        whole.sampled.update(result.sampled)
        whole.logprobs.update(result.logprobs)
        whole.prompt_logprobs.update(result.prompt_logprobs)
        whole.drafted.update(result.drafted)
        whole.accepted.update(result.accepted)
    return whole


class Runner:
    """Executes plans of requests that were announced by `admit`, and holds what sampling must remember of them."""

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache | PackedCache,
        adapters: Adapters | None = None,
        eyes: Eyes | None = None,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        chosen: Mapping[int, Tensor] | None = None,
    ) -> None:
        """chosen: as `native_network` takes it."""
        self._decoder = decoder
        self._eyes = eyes
        seen = decoder.sight.config.placeholder_ids if decoder.sight is not None else frozenset()
        self._unspeakable = sorted(seen)  # what stands for a picture in a prompt is nothing to say
        self._adapters = adapters
        self._cache = cache
        self._network = native_network(decoder, ops.KERNELS, chosen) if ops.KERNELS is not None else None
        self._batches = BatchBuilder(cache.page_size)
        self._states: dict[str, SampleState] = {}
        self._drafter, self._clock = drafter, clock

    def admit(self, request: Request, seed: int, matcher: Matcher | None = None) -> None:
        self._states[request.id] = SampleState.of(request, seed, self._decoder.config.vocab_size, matcher)

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)
        if self._drafter is not None:
            self._drafter.forget(request_id)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Computes a plan that has rows. When it raises, nothing is remembered: it may be run again, whole or in parts."""
        began = self._clock()
        drafts = self._drafts(plan)
        drafting = self._clock() - began
        if self._drafter is not None:  # what had room for drafts has none any more
            plan = Plan(tuple(replace(row, tokens=row.tokens + drafts.get(row.request_id, ()), room=0) for row in plan.rows))
        batch = self._batches.build(plan)
        look = self._eyes.compose(plan, batch) if self._eyes is not None else None
        decoder = self._decoder
        if self._adapters is not None:
            spans = [(span.first, span.end) for span in batch.spans]
            vision_T = look.vision_T if look is not None else None
            decoder = self._adapters.network([row.request_id for row in plan.rows], spans, vision_T)
        wanted, ends = self._wanted(plan, batch, drafts)
        only_best = all(one.state.takes_best for one in wanted)
        computed = self._compute(decoder, batch, ends, look, only_best=only_best)
        scored = {
            row.request_id: found
            for row, span in zip(plan.rows, batch.spans, strict=True)
            if (found := self._score_prompt(row, computed.hidden_TD[span.first : span.end]))
        }
        if self._unspeakable and computed.logits_RV is not None and ends:
            computed.logits_RV[:, self._unspeakable] = float("-inf")
        verify(computed.logits_RV, self._best_to_say(computed, ends), wanted)
        if self._drafter is not None:
            self._drafter.follow(plan.rows, computed.hidden_TD)
        self._note_scored(plan)
        named = [(one.state.request.id, one) for one in wanted]
        return StepResult(
            sampled={name: tuple(one.tokens) for name, one in named if one.tokens},
            failed={name: one.failed for name, one in named if one.failed is not None},
            logprobs={name: tuple(one.logprobs) for name, one in named if one.logprobs},
            prompt_logprobs=scored,
            drafted={name: len(draft) for name, draft in drafts.items()},
            accepted={name: one.accepted for name, one in named if one.draft},
            drafting=drafting,
        )

    def _drafts(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Guesses for rows that have room for them, as far as their grammars go along."""
        drafts = {} if self._drafter is None else self._drafter.draft(plan.rows, self._states)
        for name, draft in drafts.items():
            if (matcher := self._states[name].matcher) is not None:
                drafts[name] = draft[: matcher.agrees(draft)]
        return {name: draft for name, draft in drafts.items() if draft}

    def _wanted(self, plan: Plan, batch: Batch, drafts: Mapping[str, tuple[int, ...]]) -> tuple[list[Wanted], list[int]]:
        """Whose next tokens are wanted, and from which of the step's rows: the last certain one and all that were drafted."""
        wanted: list[Wanted] = []
        ends: list[int] = []
        for row, span in zip(plan.rows, batch.spans, strict=True):
            if row.samples:
                draft = drafts.get(row.request_id, ())
                wanted.append(Wanted(self._states[row.request_id], len(ends), draft))
                ends.extend(range(span.end - 1 - len(draft), span.end))
        return wanted, ends

    def _best_to_say(self, computed: _Computed, ends: list[int]) -> tuple[Tensor, Tensor] | None:
        """The best tokens and logits of rows `ends`, where they are known. A row whose best may not be said, which is rare, has its whole
        logits read for the next best."""
        if computed.best is None or not set(computed.best[0].tolist()) & set(self._unspeakable):
            return computed.best
        best_R, logit_R = computed.best[0].clone(), computed.best[1].clone()
        for row in torch.isin(best_R, torch.tensor(self._unspeakable)).nonzero().flatten().tolist():
            if computed.logits_RV is None:
                logits_V = self._decoder.logits(computed.hidden_TD[ends[row]][None])[0].float()
                logits_V[self._unspeakable] = float("-inf")
            else:
                logits_V = computed.logits_RV[row]
            best_R[row] = logits_V.argmax()
            logit_R[row] = logits_V[best_R[row]]
        return best_R, logit_R

    def _compute(self, decoder: Decoder, batch: Batch, ends: list[int], look: Look | None, *, only_best: bool) -> _Computed:
        """`decoder` over the batch, and the logits of rows `ends`, or their best alone; one native call where it is the bare one, packed,
        over a whole cache."""
        if look is not None and look.vision_T is None:  # text behind pictures is text further on
            batch, look = replace(batch, positions_T=look.positions), None
        if look is not None:
            x_TD = decoder.embed(batch.tokens_T)
            if look.places_F is not None and look.features_FD is not None:
                x_TD = x_TD.index_copy(0, look.places_F, look.features_FD)
            h_TD = decoder(x_TD, look.positions, self._cache.attend(batch), look.vision_T)
        elif self._network is not None and isinstance(self._cache, PagedCache) and decoder is self._decoder:
            done = self._network.step(batch.tokens_T, batch.positions_T, batch.slots_T, self._cache.store, batch.places_R3, batch.pages_RP,
                                      self._cache.page_size, torch.tensor(ends, dtype=torch.int64), only_best)  # fmt: skip
            if len(done.best_R) == len(ends):
                return _Computed(done.hidden_TD, done.logits_RV, (done.best_R, done.best_logit_R))
            h_TD = done.hidden_TD
        else:
            h_TD = decoder(decoder.embed(batch.tokens_T), batch.positions_T, self._cache.attend(batch))
        h_RD = h_TD if len(ends) == len(h_TD) else h_TD[ends]
        return _Computed(h_TD, self._decoder.logits(h_RD).float() if ends else h_RD, None)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int], request_id: str) -> list[float]:
        """One text as a vector of length 1, [D]; see `Engine.embed`. request_id: who may hold an adapter for it."""
        decoder = self._decoder if self._adapters is None else self._adapters.network([request_id], [(0, len(tokens))])
        h_TD = decoder(decoder.embed(torch.tensor(tokens)), torch.arange(len(tokens)), PackedCausal([len(tokens)]))
        mean_D = self._decoder.norm(h_TD).float().mean(dim=0)
        return (mean_D / mean_D.norm().clamp_min(1e-12)).tolist()

    def _score_prompt(self, row: PlanRow, h_TD: Tensor) -> tuple[TokenLogprobs, ...]:
        """Log probabilities of the prompt tokens that follow this row's positions, unless an earlier computation reported them."""
        state = self._states[row.request_id]
        request, count = state.request, state.request.params.prompt_logprobs
        if count is None:
            return ()
        found: list[TokenLogprobs] = []
        last = min(row.start + len(row.tokens), len(request.prompt) - 1)
        for start in range(max(row.start, state.prompt_scored), last, _SCORED_ROWS):
            end = min(start + _SCORED_ROWS, last)
            logits_RV = self._decoder.logits(h_TD[start - row.start : end - row.start]).float()
            found += score(logits_RV, request.prompt[start + 1 : end + 1], [count] * (end - start))
        return tuple(found)

    def _note_scored(self, plan: Plan) -> None:
        """What `_score_prompt` gave is not given again."""
        for row in plan.rows:
            state = self._states[row.request_id]
            if state.request.params.prompt_logprobs is not None:
                state.prompt_scored = max(state.prompt_scored, min(row.start + len(row.tokens), len(state.request.prompt) - 1))
