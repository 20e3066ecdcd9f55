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
from ernie45.plan.flops import Learned, Work
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Seen
from ernie45.train.evaluate import Measured
from ernie45.train.optim import Optimiser
from ernie45.train.step import StepReport


class Compared(NamedTuple):
    """Of each pair or answer, [P]: its loss, with gradient, and by how much it was judged rightly, without."""

    losses: Tensor
    margins: Tensor


class AnswerBatch(Protocol):
    """What every batch of answers has."""

    @property
    def labels_T(self) -> Tensor:  # noqa: N802
        """What each row learns."""
        ...

    @property
    def seen(self) -> Seen | None:
        """Its pictures."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        ...

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see each other."""
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
        work: Callable[[Learned], Work] | None = None,
    ) -> None:
        """work: what a step costs; without it the report says nothing of it."""
        self.work = work
        self.judge, self.optimiser, self.ranks, self.run, self.keep = judge, optimiser, ranks, run, keep

    def __call__(self, batches: Sequence[B], step: int, rate: float) -> StepReport:
        """Learn from the batches of one step, or this rank's of them. A step whose gradient is not finite is skipped by all ranks."""
        start = time.perf_counter()
        num_compared, tokens, learned, pairs, *pictures = map(int, self.ranks.sums(_counts(batches)))
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
        vision_tokens, patches, patch_pairs = pictures
        counted = Learned(
            tokens=tokens, pairs=pairs, head_rows=learned, vision_tokens=vision_tokens, patches=patches, patch_pairs=patch_pairs
        )
        work = None if self.work is None else self.work(counted)
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
            vision_tokens=vision_tokens or None,
            work=None if work is None else work.step,
            layer_work=None if work is None else work.layers,
        )


def _counts(batches: Sequence[AnswerBatch]) -> list[int]:
    """What is compared, tokens, labels, pairs of tokens that see each other; of pictures vision tokens, patches, pairs of these."""
    own = [0] * 7
    for batch in batches:
        labels, seen = int((batch.labels_T != IGNORED).sum()), batch.seen
        pictures = (0, 0, 0) if seen is None else (seen.num_vision, len(seen.patches_SC), seen.pairs)
        for n, count in enumerate((batch.num_compared, batch.num_tokens, labels, batch.pairs, *pictures)):
            own[n] += count
    return own


class HeldOutAnswers(Generic[B]):
    """Measures mean loss and accuracy over fixed batches of compared answers, which the ranks share out. Training is left alone."""

    def __init__(self, judge: Judge[B], batches: Sequence[B], ranks: Ranks = ALONE, run: Run = plainly) -> None:
        assert batches, "without held-out rows nothing is measured"
        self.judge, self.batches, self.ranks, self.run = judge, batches, ranks, run

    @torch.no_grad()
    def __call__(self) -> Measured:
        """Both now."""
        loss, right, world = 0.0, 0.0, self.ranks.world
        for number in range(self.ranks.rank, -(-len(self.batches) // world) * world, world):
            # ranks that share the weights run equally many passes: beyond the end a batch is run again, and not counted
            compared = self.run(self.judge, self.batches[min(number, len(self.batches) - 1)])
            if number < len(self.batches):
                loss += compared.losses.sum().item()
                right += (compared.margins > 0).sum().item()
        loss, right = self.ranks.sums([loss, right])
        count = sum(batch.num_compared for batch in self.batches)
        return Measured(loss / count, right / count)
