"""Round to nearest, with a search for the clip that loses least: quantisation without data.

For every row and group the largest magnitude is shrunk step by step, and the scale whose rounding has the smallest squared error is kept.
Letters: O and I out- and input widths, G groups of inputs.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.ops.codes import CodedWeight
from ernie45.ops.quantised import PackedWeight
from ernie45.quant.ccq import encode
from ernie45.quant.hadamard import turned
from ernie45.quant.pack import group_width, pack_as
from ernie45.quant.spec import Scheme

_CLIPS = {4: tuple(1 - 0.05 * step for step in range(9)), 8: (1.0,)}  # 1.0 .. 0.6; at 8 bits clipping gains nothing
_FEW_CLIPS = {4: (0.95, 0.85), 8: (1.0,)}
_ROWS_AT_ONCE = 256  # bounds the memory of the search, and stays in the cache


def round_to_nearest(weight_OI: Tensor, scheme: Scheme) -> PackedWeight | CodedWeight:
    """Quantise and pack, or encode, a matrix [O, I]. Raises `CheckpointError` when it holds values that are no finite numbers."""
    return _packed(weight_OI, scheme, _CLIPS)


def round_quickly(weight_OI: Tensor, scheme: Scheme) -> PackedWeight | CodedWeight:
    """`round_to_nearest` with four scales to choose from in place of 18: a quarter of the time, for models quantised at each start."""
    return _packed(weight_OI, scheme, _FEW_CLIPS)


def nearest(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """What `round_to_nearest` packs: whole numbers int8 of the (turned) matrix, and float32 scales [O, G]; not of codes."""
    return _nearest(weight_OI, scheme, _CLIPS)


def _packed(weight_OI: Tensor, scheme: Scheme, clips: Mapping[int, Sequence[float]]) -> PackedWeight | CodedWeight:
    if scheme.code:
        return encode(turned(weight_OI.detach().float(), scheme), scheme.code).weight
    return pack_as(scheme, *_nearest(weight_OI, scheme, clips))


def _nearest(weight_OI: Tensor, scheme: Scheme, clips: Mapping[int, Sequence[float]]) -> tuple[Tensor, Tensor]:
    parts = [_quantise(turned(rows.float(), scheme), scheme, clips[scheme.weight_bits]) for rows in weight_OI.detach().split(_ROWS_AT_ONCE)]
    whole_OI, scales_OG = (torch.cat(list(p)) for p in zip(*parts, strict=True))
    return whole_OI, scales_OG


def _quantise(weight_OI: Tensor, scheme: Scheme, clips: Sequence[float]) -> tuple[Tensor, Tensor]:
    if not bool(weight_OI.isfinite().all()):
        raise CheckpointError("a weight holds NaN or infinities and cannot be quantised; the checkpoint is damaged")
    width = weight_OI.shape[1]
    group = group_width(width, scheme.group)
    w = torch.nn.functional.pad(weight_OI.float(), (0, -width % group)).unflatten(1, (-1, group))
    largest = w.abs().amax(-1)
    best_error, best_scale = torch.full_like(largest, float("inf")), torch.zeros_like(largest)
    for scale in _scales(w, largest, scheme.weight_bits, clips):
        whole = whole_numbers(w, scale, scheme.weight_bits)
        error = (whole * scale[..., None] - w).square().sum(-1)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    return whole_numbers(w, best_scale, scheme.weight_bits).to(torch.int8).flatten(1)[:, :width], best_scale


def _scales(w: Tensor, largest: Tensor, bits: int, clips: Sequence[float]) -> Iterator[Tensor]:
    """Scales to try, rounded to float16 as they will be stored: that comes before the choice of whole numbers.

    At 4 bits also those that map the largest value, sign and all, to -8: the lowest number has no positive twin and is lost otherwise.
    """
    top = 2 ** (bits - 1) - 1
    for clip in clips:
        yield (largest * (clip / top)).to(torch.float16).float()
    if bits == 4:
        signed = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        for clip in clips:
            yield (signed * (clip / -(top + 1))).to(torch.float16).float()


def whole_numbers(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest whole number of every weight [.., G, I / G] for scales [.., G], within the range of `bits`, as floats."""
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return (w * inverse[..., None]).round_().clamp_(*whole_range(bits))


def whole_range(bits: int) -> tuple[int, int]:
    """The least and the largest whole number of a weight; at 8 bits they are symmetric."""
    top = 2 ** (bits - 1) - 1
    return -top - (bits == 4), top
