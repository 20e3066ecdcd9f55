"""From a step's logits to tokens, drafted ones included: each is chosen exactly as it would have been without drafts.

The first of a request's rows gives its next token; when that is the first drafted token, the second row gives the one behind it, and so on
until a choice differs. Penalties, bias, bad words, min_tokens, grammar, cuts and log probabilities see the answer as it stands at that
place, and the random number belongs to the place in the answer (`sampler.uniform`). So an answer is not only of the same distribution: with
the same seed it is the same answer, whether, how far and by whom it was drafted. A drafted token d is taken with probability p(d), which
for a draft that is certain of its guess is what rejection sampling (Leviathan et al. 2023) takes it with.

Letters: R rows that are wanted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ernie45.engine.output import TokenLogprobs
from ernie45.engine.request import FinishReason
from ernie45.engine.sampler import SampleState, sample, take_best


@dataclass(slots=True)
class Wanted:
    """One request's rows `first`, `first + 1`, ... of R: the next token, then one behind each drafted token."""

    state: SampleState
    first: int
    draft: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    failed: FinishReason | None = None

    @property
    def accepted(self) -> int:
        """How many drafted tokens turned out right."""
        return sum(token == guess for token, guess in zip(self.tokens, self.draft, strict=False))

    @property
    def row(self) -> int:
        """The row that the next choice is made from."""
        return self.first + len(self.tokens)

    def take(self, token: int | None, logprob: TokenLogprobs | None, *, numbers: bool) -> bool:
        """Takes in what was chosen; True when the row behind it counts. numbers: whether the logits were such."""
        if token is None:  # the logits are no numbers, or bad words forbid all that the grammar allows
            self.failed = FinishReason.grammar if self.state.matcher is not None and numbers else FinishReason.error
            return False
        if not self.state.append(token):  # the grammar passed its limits: it can say nothing about what may follow
            self.failed = FinishReason.grammar
            return False
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        place = len(self.tokens) - 1
        return place < len(self.draft) and self.draft[place] == token and not self.state.ended


def verify(logits_RV: Tensor | None, best: tuple[Tensor, Tensor] | None, wanted: Sequence[Wanted]) -> None:
    """Fills in what each request gets, from float32 logits, which may be overwritten, and where they are known, the place and value of
    each row's best; without logits when these are enough for all. When it raises, nothing is remembered."""
    try:
        _verify(logits_RV, best, wanted)
    except BaseException:
        for one in wanted:
            one.state.take_back(len(one.tokens))
        raise


def _verify(logits_RV: Tensor | None, best: tuple[Tensor, Tensor] | None, wanted: Sequence[Wanted]) -> None:
    going: Sequence[Wanted] = wanted
    count = sum(1 + len(one.draft) for one in wanted)
    while going:
        rows = [one.row for one in going]
        states = [one.state for one in going]
        every = len(rows) == count
        if best is not None and all(state.takes_best for state in states):
            result = take_best(*(best if every else (best[0][rows], best[1][rows])))
        else:
            assert logits_RV is not None, "who computed the step took a request for one that wants its best token"
            result = sample(logits_RV if every else logits_RV[rows], states)
        chosen = zip(going, result.tokens, result.logprobs, strict=True)
        going = [one for one, token, logprob in chosen if one.take(token, logprob, numbers=not _broken(logits_RV, one.row, token))]


def _broken(logits_RV: Tensor | None, row: int, token: int | None) -> bool:
    return token is None and logits_RV is not None and bool(logits_RV[row].isnan().any())
