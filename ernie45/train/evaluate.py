"""The loss on rows that are not learned from, beside training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.errors import DataError
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import Run, plainly
from ernie45.train.batch import TrainBatch
from ernie45.train.cross_entropy import summed_cross_entropy
from ernie45.train.forward import states


class Measured(NamedTuple):
    """Of held-out rows: the mean loss of a label, pair or answer, and of pairs and answers the share that is judged rightly."""

    loss: float
    accuracy: float | None = None


class HeldOut:
    """Measures the mean loss per label over fixed batches, which the ranks share out. Nothing of the training is touched."""

    def __init__(self, decoder: Decoder, batches: Sequence[TrainBatch], *, ranks: Ranks = ALONE, run: Run = plainly) -> None:
        """Raises DataError when nothing in the batches has a label."""
        self.decoder, self.batches, self.ranks, self.run = decoder, batches, ranks, run
        self.learned = sum(batch.learned for batch in batches)
        if not self.learned:
            raise DataError("the held-out rows have no learned label; check which parts of them are learned")

    @torch.no_grad()
    def __call__(self) -> Measured:
        """The loss now."""
        total, world = 0.0, self.ranks.world
        for number in range(self.ranks.rank, -(-len(self.batches) // world) * world, world):
            # ranks that share the weights run equally many passes: beyond the end a batch is run again, and not counted
            loss = self.run(self._loss, self.batches[min(number, len(self.batches) - 1)]).item()
            total += loss if number < len(self.batches) else 0.0
        return Measured(self.ranks.sums([total])[0] / self.learned)

    def _loss(self, batch: TrainBatch) -> Tensor:
        decoder = self.decoder
        h_TD = states(decoder, batch, PackedCausal(list(batch.doc_ends)), recompute=False)
        weights_T = torch.ones(batch.labels_T.shape, dtype=torch.float32)
        return summed_cross_entropy(decoder.norm(h_TD), decoder.head_matrix, batch.labels_T, weights_T, bias_V=decoder.head_bias).total
