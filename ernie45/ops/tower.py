"""One block of a vision tower in two native calls: queries, keys and values of some patches, then all that follows from them.

The plain twin is `TowerBlock` of `models/vision.py`. Between the calls queries, keys and values lie in a tensor in the kernels' own order
(kernels/src/tower.h); nobody else reads it. Inside, numbers are bfloat16 wherever separate layers would round to it, except between a
product and its activation or the sum it is added to: there the kernels keep float32.

Letters: G frames, R patches of one call in each, D width, N heads, H head size, Q = H / 2 angles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.ops.native import Native
from ernie45.ops.quantised import PackedWeight

FRAME_PADDING = 32
"""Patches of a call begin at a multiple of this within their frame."""


class TowerMatrix(NamedTuple):
    """A weight [O, I], whole or packed, and a bias [O]."""

    weight: Tensor | PackedWeight
    bias: Tensor


class TowerNorm(NamedTuple):
    """Weight and bias of a norm by mean and variance, [D] each."""

    weight: Tensor
    bias: Tensor
    eps: float


class TowerWeights(NamedTuple):
    """One block, in the order in which it is computed."""

    num_heads: int
    attn_norm: TowerNorm
    qkv: TowerMatrix
    out: TowerMatrix
    ffn_norm: TowerNorm
    up: TowerMatrix
    down: TowerMatrix

    @property
    def size(self) -> int:
        """Width of the tower."""
        return self.attn_norm.weight.shape[0]


def takes(kernels: Native | None, block: TowerWeights) -> bool:
    """Whether the kernels compute this block: AMX, bfloat16, matrices whole or packed in 8 bits with one scale a row."""
    size, inner = block.size, block.up.bias.shape[0]
    if kernels is None or kernels.isa != "amx" or size % 64 or inner % 64 or size // block.num_heads % 16 or size // block.num_heads > 128:
        return False
    plain = [*block.attn_norm[:2], *block.ffn_norm[:2], block.qkv.bias, block.out.bias, block.up.bias, block.down.bias]
    matrices = [block.qkv.weight, block.out.weight, block.up.weight, block.down.weight]
    plain += [weight for weight in matrices if isinstance(weight, Tensor)]
    packed = [weight for weight in matrices if isinstance(weight, PackedWeight)]
    return all(x.dtype == torch.bfloat16 and x.is_cpu and x.is_contiguous() for x in plain) and all(
        weight.bits == 8 and not weight.hadamard and weight.scales.shape[1] == 1 and weight.values.is_cpu for weight in packed
    )


class NativeTowerBlock:
    """A block that the kernels take; it keeps the weights it was given."""

    def __init__(self, kernels: Native, block: TowerWeights) -> None:
        assert takes(kernels, block), "the kernels do not compute this block"
        self._isa, self._block = kernels.isa, block

    def space(self, frames: int, patches: int) -> Tensor:
        """Room for queries, keys and values of `frames` frames of `patches` patches each."""
        heads, size = self._block.num_heads, self._block.size // self._block.num_heads
        filled = -(-patches // FRAME_PADDING) * FRAME_PADDING
        return torch.empty(frames, heads, filled * (2 * -(-size // 32) * 32 + size), dtype=torch.bfloat16)

    def heads(self, x_GRD: Tensor, turns_RQ: Tensor, space: Tensor, patches: int, first: int = 0) -> None:
        """Norm, queries, keys and values of the patches `first` and on of frames of `patches`, turned, into `space`."""
        block, turns = self._block, torch.view_as_real(turns_RQ)
        qkv = (*_stored(block.qkv), block.qkv.bias)
        torch.ops.ernie45.tower_heads(x_GRD, *block.attn_norm, *qkv, turns, block.num_heads, patches, first, space, self._isa)

    def rest(self, x_GRD: Tensor, space: Tensor, patches: int, first: int = 0) -> Tensor:
        """The block's result [G, R, D] for the same patches, once `space` holds all of their frames."""
        block = self._block
        out, up, down = ((*_stored(matrix), matrix.bias) for matrix in (block.out, block.up, block.down))
        return torch.ops.ernie45.tower_rest(
            x_GRD, space, block.num_heads, patches, first, *out, *block.ffn_norm, *up, *down, self._isa
        )  # fmt: skip


def _stored(matrix: TowerMatrix) -> tuple[Tensor, Tensor | None]:
    weight = matrix.weight
    return (weight.values, weight.scales) if isinstance(weight, PackedWeight) else (weight, None)
