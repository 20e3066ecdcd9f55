"""From logits to the next token of each row.

What one row gets depends on its own logits, settings and history alone: the random number is made from (seed, place in the output), and a
cut keeps all ties, so neither the other rows nor how far a sort had to go can change the answer.
Letters: R rows that sample, V vocabulary, W the best candidates looked at.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ernie45.engine.grammar import Matcher
from ernie45.engine.output import TokenLogprobs
from ernie45.engine.request import Request

_FIRST_WINDOW = 256  # nearly every top-p set is smaller; the window grows when it is not
_NO = float("-inf")


@dataclass(slots=True)
class SampleState:
    """What sampling must remember of one request. seen_V and counts_V exist only when penalties are on, matcher with a grammar."""

    request: Request
    seed: int
    output: list[int] = field(default_factory=list)
    seen_V: Tensor | None = None  # bool: in prompt or output
    counts_V: Tensor | None = None  # float32: times in the output
    prompt_scored: int = 0  # prompt tokens whose log probability was already reported
    matcher: Matcher | None = None

    @classmethod
    def of(cls, request: Request, seed: int, vocab_size: int, matcher: Matcher | None = None) -> "SampleState":
        state = cls(request, seed, matcher=matcher)
        if request.params.penalised:
            state.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            state.seen_V[list(request.prompt)] = True
            state.counts_V = torch.zeros(vocab_size)
        return state

    @property
    def takes_best(self) -> bool:
        """True when the next token is simply that of the largest logit, and no logit is reported or changed."""
        params = self.request.params
        changed = params.penalised or params.logit_bias or params.bad_words or len(self.output) < params.min_tokens
        return params.greedy and not changed and params.logprobs is None and self.matcher is None

    @property
    def ended(self) -> bool:
        """True when the newest token ends the answer."""
        return bool(self.output) and self.output[-1] in self.request.end_ids and len(self.output) > self.request.params.min_tokens

    def copy(self) -> "SampleState":
        """The same to guess with, without the grammar: what is appended to it is not remembered here."""
        seen_V, counts_V = (None if tensor is None else tensor.clone() for tensor in (self.seen_V, self.counts_V))
        return replace(self, output=[*self.output], seen_V=seen_V, counts_V=counts_V, matcher=None)

    def take_back(self, count: int) -> None:
        """Forgets the newest tokens."""
        if not count:
            return
        gone = self.output[-count:]
        del self.output[-count:]
        if self.seen_V is not None and self.counts_V is not None:
            known = {*self.request.prompt, *self.output}
            for token in gone:
                self.counts_V[token] -= 1
                self.seen_V[token] = token in known
        if self.matcher is not None:
            self.matcher.take_back(count)

    def append(self, token: int) -> bool:
        """Takes in the chosen token. False when the grammar broke on it."""
        self.output.append(token)
        if self.seen_V is not None and self.counts_V is not None:
            self.seen_V[token] = True
            self.counts_V[token] += 1
        return self.matcher is None or self.matcher.consume(token)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry per row: the token, or None where the logits were not numbers or nothing was allowed."""

    tokens: tuple[int | None, ...]
    logprobs: tuple[TokenLogprobs | None, ...]


def take_best(best_R: Tensor, logits_R: Tensor) -> Sampled:
    """`sample` of rows that all `takes_best`, from the place of each row's largest logit and that logit, NaN where any was none."""
    chosen = zip(best_R.tolist(), logits_R.tolist(), strict=True)
    return Sampled(tuple(token if math.isfinite(logit) else None for token, logit in chosen), (None,) * len(best_R))


def sample(logits_RV: Tensor, states: Sequence[SampleState]) -> Sampled:
    """The next token of each row of float32 logits, which may be overwritten. The states are not changed: call `append`."""
    wants_logprobs = [i for i, state in enumerate(states) if state.request.params.logprobs is not None]
    raw_RV = logits_RV.clone() if wants_logprobs else logits_RV
    healthy = torch.isfinite(logits_RV.amax(dim=-1)).tolist()
    adjust(logits_RV, states)
    tokens = [token if ok else None for token, ok in zip(choose(logits_RV, states), healthy, strict=True)]
    logprobs: list[TokenLogprobs | None] = [None] * len(states)
    scored = [i for i in wants_logprobs if tokens[i] is not None]
    if scored:
        counts = [states[i].request.params.logprobs or 0 for i in scored]
        found = score(raw_RV[scored], [token for i in scored if (token := tokens[i]) is not None], counts)
        for i, entry in zip(scored, found, strict=True):
            logprobs[i] = entry
    return Sampled(tuple(tokens), tuple(logprobs))


def score(logits_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of `tokens` and of the `counts[i]` best of each row, from raw float32 logits."""
    norm_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    chosen_R = (logits_RV.gather(1, torch.tensor(tokens)[:, None]) - norm_R1).squeeze(1).tolist()
    best = logits_RV.topk(min(max((1, *counts)), logits_RV.shape[1]), dim=-1)
    ids, values = best.indices.tolist(), (best.values - norm_R1).tolist()
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (token, logprob, count) in enumerate(zip(tokens, chosen_R, counts, strict=True))
    ]


def adjust(logits_RV: Tensor, states: Sequence[SampleState]) -> None:
    """Penalties, logit bias, bad words, min_tokens and grammar, in place and in this order; rows that ask for none cost nothing."""
    penalised = [i for i, state in enumerate(states) if state.seen_V is not None]
    if penalised:
        logits_RV[penalised] = _penalised(logits_RV[penalised], [states[i] for i in penalised])
    for i, state in enumerate(states):
        params = state.request.params
        if params.logit_bias:
            logits_RV[i, list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        forbidden = _forbidden(state)
        if forbidden:
            logits_RV[i, forbidden] = _NO
        if state.matcher is not None:
            logits_RV[i].masked_fill_(~unpacked(state.matcher.allowed(), logits_RV.shape[1]), _NO)


def unpacked(bits: bytes, size: int) -> Tensor:
    """A mask of one bit per id, lowest first, as bool [V]; ids beyond the mask (rows no token file names) are False."""
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    found = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()[:size]
    return torch.cat([found, torch.zeros(size - len(found), dtype=torch.bool)]) if len(found) < size else found


def _penalised(logits_RV: Tensor, states: Sequence[SampleState]) -> Tensor:
    """Repetition: logits of seen tokens are divided (positive) or multiplied (negative); frequency and presence: subtracted."""
    params = [state.request.params for state in states]
    repetition, presence, frequency = (
        torch.tensor(values)[:, None]
        for values in zip(*((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params), strict=True)
    )
    seen_RV = torch.stack([state.seen_V for state in states if state.seen_V is not None])
    counts_RV = torch.stack([state.counts_V for state in states if state.counts_V is not None])
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition)
    return torch.where(seen_RV, repeated_RV, logits_RV) - frequency * counts_RV - presence * (counts_RV > 0)


def _forbidden(state: SampleState) -> list[int]:
    """Ids that may not come next: the last id of a bad word whose beginning stands at the end of the output, and early ends."""
    params, output = state.request.params, state.output
    ids = [word[-1] for word in params.bad_words if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]]
    if len(output) < params.min_tokens and not (state.matcher is not None and state.matcher.over):
        ids.extend(state.request.end_ids)
    return ids


def choose(logits_RV: Tensor, states: Sequence[SampleState]) -> list[int | None]:
    """The best token of greedy rows, a drawn one of the others; None where nothing is allowed."""
    best_R = logits_RV.amax(dim=-1)  # far cheaper than finding its place too, which only greedy rows need
    possible = torch.isfinite(best_R).tolist()
    tokens: list[int | None] = [None] * len(states)
    greedy = [i for i, state in enumerate(states) if state.request.params.greedy and possible[i]]
    if greedy:
        rows_RV = logits_RV if len(greedy) == len(states) else logits_RV[greedy]
        for i, token in zip(greedy, rows_RV.argmax(dim=-1).tolist(), strict=True):
            tokens[i] = token
    drawn = [i for i, state in enumerate(states) if not state.request.params.greedy and possible[i]]
    if drawn:
        params = [states[i].request.params for i in drawn]
        # shifted so that the best is 0: no division by a small temperature can overflow upwards
        scaled_RV = (logits_RV[drawn] - best_R[drawn, None]) / torch.tensor([p.temperature for p in params])[:, None]
        cuts = cut_offs(scaled_RV, [p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params])
        for i, row_V, cut in zip(drawn, scaled_RV, cuts.tolist(), strict=True):
            tokens[i] = _draw(row_V, cut, uniform(states[i].seed, len(states[i].output)))
    return tokens


def cut_offs(scaled_RV: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """The least logit that stays, per row [R]; -inf where nothing is cut. Rows are scaled by temperature, their best is 0.

    top-k keeps the k best; top-p of those the smallest set with a mass of at least p; min-p what is at least min_p times the best. At
    least the best stays, and with it every tie of the last that stays.
    """
    cut_R = torch.full((len(top_k),), _NO)
    V = scaled_RV.shape[1]
    ranked = [i for i in range(len(top_k)) if 0 < top_k[i] < V or top_p[i] < 1.0]
    if ranked:
        cut_R[ranked] = _rank_cuts(scaled_RV[ranked], [top_k[i] or V for i in ranked], [top_p[i] for i in ranked])
    return torch.maximum(cut_R, torch.tensor(min_p).log())


def _rank_cuts(scaled_RV: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """Looks at the best W tokens only, and at more until no row's answer lies beyond them."""
    V = scaled_RV.shape[1]
    k_R1, p_R1 = torch.tensor(top_k)[:, None], torch.tensor(top_p)[:, None]
    limited_R1 = k_R1 < V
    whole_R1 = torch.zeros(()) if max(top_k) < V else scaled_RV.logsumexp(dim=-1, keepdim=True)
    W = max(_FIRST_WINDOW, *(k + 16 for k in top_k if k < V), 0)
    while True:
        W = min(W, V)
        top_RW = scaled_RV.topk(W, dim=-1).values
        kth_R1 = top_RW.gather(1, (k_R1 - 1).clamp(max=W - 1)).where(k_R1 <= W, torch.tensor(_NO))
        in_k_RW = top_RW >= kth_R1
        norm_R1 = torch.where(limited_R1, top_RW.masked_fill(~in_k_RW, _NO).logsumexp(dim=-1, keepdim=True), whole_R1)
        mass_RW = (top_RW - norm_R1).exp()
        stays_RW = in_k_RW & ((mass_RW.cumsum(dim=-1) - mass_RW < p_R1) | (p_R1 >= 1.0))
        unseen_R1 = stays_RW[:, -1:] | (in_k_RW[:, -1:] & limited_R1)  # what stays, or ties of the k-th, may lie beyond the window
        if W == V or not bool(unseen_R1.any()):
            return top_RW.gather(1, stays_RW.sum(dim=-1, keepdim=True) - 1).squeeze(1)
        W *= 16


def _draw(row_V: Tensor, cut: float, u: float) -> int:
    """Inverse of the cumulative distribution over what stays, in the order of ids; sums in float64."""
    mass_V = row_V.double().exp_()
    if cut != _NO:
        mass_V.masked_fill_(row_V < cut, 0.0)  # not by -inf before: exp of it is ten times slower than of a number
    mass_V = mass_V.cumsum_(0)
    place = int(torch.searchsorted(mass_V, mass_V[-1] * u, right=True))
    return min(place, int(torch.searchsorted(mass_V, mass_V[-1])))  # rounding may put u at the very end: then the last that stays


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the output token `index` of a request: 53 bits of BLAKE2b of (seed, index)."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
