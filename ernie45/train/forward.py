"""One pass of a decoder with gradient: words and pictures to embeddings, and the layers, with or without computing them again in backward.

Letters: T tokens, D width, S patches, C numbers of one patch, F tokens of pictures.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ernie45.models.places import Grid
from ernie45.models.text import Decoder
from ernie45.models.vision import Sight, Tower
from ernie45.nn.attention import Attend
from ernie45.nn.moe import Modality
from ernie45.train.batch import Seen


class PlacedBatch(Protocol):
    """What a pass needs of a batch: ids [T], positions [T] or [T, 3], and pictures."""

    @property
    def tokens_T(self) -> Tensor:  # noqa: N802
        """What the model sees."""
        ...

    @property
    def positions_T(self) -> Tensor:  # noqa: N802
        """Where it stands."""
        ...

    @property
    def seen(self) -> Seen | None:
        """What placeholders stand for."""
        ...


def with_pictures(decoder: Decoder, x_TD: Tensor, tokens_T: Tensor, seen: Seen | None, *, recompute: bool) -> Tensor:
    """The embedding [T, D] with what was seen in place of the placeholders; the embedding itself where nothing was."""
    if seen is None:
        return x_TD
    assert decoder.sight is not None, "batches with pictures are made for models that see"
    features_FD = features(decoder.sight, seen.patches_SC, seen.grids, recompute=recompute)
    return decoder.sight.put(x_TD, tokens_T, features_FD.to(x_TD.dtype))


def states(decoder: Decoder, batch: PlacedBatch, attend: Attend, *, recompute: bool) -> Tensor:
    """The last layer's output for a batch, [T, D], before the final norm."""
    seen = batch.seen
    x_TD = with_pictures(decoder, decoder.embed(batch.tokens_T), batch.tokens_T, seen, recompute=recompute)
    return trunk(decoder, x_TD, batch.positions_T, attend, None if seen is None else seen.vision_T, recompute=recompute)


def features(sight: Sight, patches_SC: Tensor, grids: Sequence[Grid], *, recompute: bool) -> Tensor:
    """`sight(patches, grids)`; with `recompute` only the input of each block of the tower is kept, and that of the resampler."""
    if not recompute or not any(parameter.requires_grad for parameter in sight.parameters()):
        return sight(patches_SC, grids)
    x_SD = _tower(sight.tower, patches_SC.to(sight.resampler.norm.weight.dtype), grids)
    return checkpoint(sight.resampler, x_SD, grids, use_reentrant=False)


def _tower(tower: Tower, patches_SC: Tensor, grids: Sequence[Grid]) -> Tensor:
    x_SD, runs = tower.patches(patches_SC), tower.runs(grids)
    for block in tower.blocks:
        x_SD = checkpoint(block, x_SD, runs, use_reentrant=False)
    return tower.norm(x_SD)


def trunk(
    decoder: Decoder, x_TD: Tensor, positions_T: Tensor, attend: Attend, vision_T: Tensor | None = None, *, recompute: bool
) -> Tensor:
    """`decoder(x, positions, attend, vision)`; `recompute` keeps only each layer's input and computes the layer again in backward."""
    if not recompute:
        return decoder(x_TD, positions_T, attend, vision_T)
    turns_TP, modality = decoder.turns(positions_T), Modality.of(vision_T)
    for layer in decoder.layers:
        x_TD = checkpoint(layer, x_TD, turns_TP, attend, modality, use_reentrant=False)
    return x_TD
