"""Packing: whole numbers and scales to the order the kernels read, and back. The format stands in `ops/quantised.py`.

Letters: O and I out- and input widths, G groups of inputs.
"""

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.ops.quantised import PackedWeight, unpack
from ernie45.quant.spec import Scheme

CHANNEL_STEP = 64  # one scale per channel: the inputs are filled up to a multiple of this
_LARGEST_SCALE = 65504.0  # float16


def group_width(in_size: int, group: int) -> int:
    """Inputs that share a scale: `group`, or for 0 (a scale per channel) the whole row, filled up."""
    return group or -(-in_size // CHANNEL_STEP) * CHANNEL_STEP


def packed_shapes(out_size: int, in_size: int, bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `values` (uint8) and `scales` (float16) of a matrix [O, I]."""
    width = group_width(in_size, group)
    groups, blocks = -(-in_size // width), -(-out_size // 16)
    return (blocks, groups * width * bits // 32, 64), (blocks, groups, 16)


def pack(whole_OI: Tensor, scales_OG: Tensor, bits: int, group: int, *, hadamard: bool = False, float_inputs: bool = False) -> PackedWeight:
    """Pack int8 [O, I] of -8 .. 7 (4 bits) or -127 .. 127 (8 bits) and float32 scales [O, G]; `hadamard`: of a turned matrix,
    `float_inputs`: for activations that stay floats.

    Raises `CheckpointError` when a scale is no finite number or beyond float16.
    """
    O, I = whole_OI.shape  # noqa: E741
    if not bool((scales_OG.abs() <= _LARGEST_SCALE).all()):  # NaN compares false
        raise CheckpointError(
            f"a weight scale is not a number up to {_LARGEST_SCALE:.0f}: the weights hold NaN, infinities or absurd values"
        )
    (blocks, quads, _), (_, groups, _) = packed_shapes(O, I, bits, group)
    width = group_width(I, group)
    rows = torch.nn.functional.pad(whole_OI.to(torch.int16), (0, groups * width - I, 0, blocks * 16 - O))
    scales = torch.nn.functional.pad(scales_OG, (0, 0, 0, blocks * 16 - O)).view(blocks, 16, groups).transpose(1, 2)
    if bits == 8:
        values = (rows + 128).view(blocks, 16, quads, 4).permute(0, 2, 1, 3)
    else:
        nibbles = (rows + 8).view(blocks, 16, quads, 2, 4)
        values = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).permute(0, 2, 1, 3)
    packed = values.to(torch.uint8).reshape(blocks, quads, 64)
    return PackedWeight(packed, scales.to(torch.float16).contiguous(), bits, O, hadamard, float_inputs)


def pack_as(scheme: Scheme, whole_OI: Tensor, scales_OG: Tensor) -> PackedWeight:
    """`pack` as `scheme` says."""
    return pack(whole_OI, scales_OG, scheme.weight_bits, scheme.group, hadamard=scheme.hadamard, float_inputs=scheme.float_inputs)


def unpacked(weight: PackedWeight, in_size: int) -> tuple[Tensor, Tensor]:
    """Whole numbers int8 [O, I] and scales float32 [O, G]: what `pack` was given, scales rounded to float16."""
    scales_OG = weight.scales.float().transpose(1, 2).reshape(-1, weight.scales.shape[1])
    return unpack(weight)[:, :in_size], scales_OG[: weight.out_size]
