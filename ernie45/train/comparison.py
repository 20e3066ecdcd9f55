"""One optimiser step over compared answers, whatever compares them: a judge gives each pair or answer a loss and a margin.

Judges: `preference.PairJudge` (DPO and its kin), `unpaired.UnpairedJudge` (KTO), `reward.RewardJudge` (a reward model). Letters: P pairs or
answers, T tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import Run, plainly
from ernie45.tokens.template import IGNORED
from ernie45.train.optim import Optimiser
from ernie45.train.step import StepReport


class Compared(NamedTuple):
    """Of each pair or answer, [P]: its loss, with gradient, and by how much it was judged rightly, without."""

    losses: Tensor
    margins: Tensor


class AnswerBatch(Protocol):
    """What every batch of answers has."""

    labels_T: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        ...

    @property
    def num_compared(self) -> int:
        """P."""
        ...


B = TypeVar("B", bound=AnswerBatch)
C = TypeVar("C", bound=AnswerBatch, contravariant=True)


class Judge(Protocol[C]):
    """Compares the answers of a batch."""

    def __call__(self, batch: C) -> Compared:
        """Loss and margin of each."""
        ...


class ComparisonStep(Generic[B]):
    """The loss is the mean over all that the whole step compares, however it is cut into batches or shared out among ranks."""

    def __init__(
        self,
        judge: Judge[B],
        optimiser: Optimiser,
        *,
        ranks: Ranks = ALONE,
        run: Run = plainly,
        keep: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.judge, self.optimiser, self.ranks, self.run, self.keep = judge, optimiser, ranks, run, keep

    def __call__(self, batches: Sequence[B], step: int, rate: float) -> StepReport:
        """Learn from the batches of one step, or this rank's of them. A step whose gradient is not finite is skipped by all ranks."""
        start = time.perf_counter()
        own = (
            sum(batch.num_compared for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(int((batch.labels_T != IGNORED).sum()) for batch in batches),
        )
        num_compared, tokens, learned = map(int, self.ranks.sums(own))
        loss, margins = 0.0, []
        for batch in batches:
            with self.keep():
                compared = self.run(self.judge, batch)
                total = compared.losses.sum() / num_compared
                total.backward()
            loss += total.item()
            margins.append(compared.margins)
        self.ranks.add_gradients(list(self.optimiser.parameters.values()))
        margin_P = torch.cat(margins)
        loss, margin, preferred = self.ranks.sums((loss, margin_P.sum().item(), (margin_P > 0).sum().item()))
        norm = self.ranks.from_first(self.optimiser.gradient_norm())
        skipped = not math.isfinite(norm)
        self.optimiser.drop_gradients() if skipped else self.optimiser.step(rate, norm)
        return StepReport(
            step=step,
            loss=loss,
            rate=rate,
            norm=norm,
            tokens=tokens,
            learned=learned,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            margin=margin / num_compared,
            accuracy=preferred / num_compared,
        )
