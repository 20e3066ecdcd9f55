"""Products with a frozen matrix in floats, whether it is held whole or packed: what adapters are trained beside.

A packed matrix becomes floats block by block, in forward and again in backward: no float copy of it is kept, and activations are not
rounded to whole numbers as they are when a packed model is served. Letters: T tokens, I and O in- and output widths, B rows of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ernie45.ops.quantised import PackedWeight, dequantise, turn_by_hadamard

_AT_ONCE = 1 << 21
"""Floats of a packed matrix that are made at a time: 8 MB."""


def dense(weight: Tensor | PackedWeight, in_size: int) -> Tensor:
    """The matrix in floats, [O, I]: itself, or a new one that a packed weight stands for, float32."""
    return dequantise(weight)[:, :in_size] if isinstance(weight, PackedWeight) else weight


def packed_dense_linear(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """`x @ weight.T` in the type of `x`, with the gradient of `x`; the weight has none."""
    return _Product.apply(x_TI, weight)


def pulled_back(pull_TO: Tensor, weight: PackedWeight, in_size: int) -> Tensor:
    """`pull @ weight`, [T, O] -> [T, I]: the gradient of `x` from that of the product."""
    pull_TI = pull_TO.new_zeros(len(pull_TO), weight.padded_in)
    start = 0
    for block_BI in _blocks(weight):
        pull_TI.addmm_(pull_TO[:, start : start + len(block_BI)], block_BI.to(pull_TI.dtype))
        start += len(block_BI)
    turned_TI = turn_by_hadamard(pull_TI, weight.group) if weight.hadamard else pull_TI
    return turned_TI[:, :in_size]


class _Product(torch.autograd.Function):
    """Where the matrix is turned (see `quantised`), the rows of `x` are turned instead: T x I numbers in place of O x I."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.in_size = weight, x_TI.shape[1]
        padded_TI = torch.nn.functional.pad(x_TI, (0, weight.padded_in - x_TI.shape[1]))
        turned_TI = turn_by_hadamard(padded_TI, weight.group) if weight.hadamard else padded_TI
        out_TO, start = x_TI.new_empty(len(x_TI), weight.out_size), 0
        for block_BI in _blocks(weight):
            out_TO[:, start : start + len(block_BI)] = turned_TI @ block_BI.to(x_TI.dtype).t()
            start += len(block_BI)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return pulled_back(upstream[0], ctx.weight, ctx.in_size), None


def _blocks(weight: PackedWeight) -> Iterator[Tensor]:
    """The matrix as it was rounded (turned, where it is), float32 [B, I padded] after [B, I padded]; the packing has 16 rows a piece."""
    step = max(1, _AT_ONCE // (16 * weight.padded_in))
    for start in range(0, len(weight.values), step):
        out_size = min(16 * step, weight.out_size - 16 * start)
        yield dequantise(weight._replace(values=weight.values[start : start + step], scales=weight.scales[start : start + step],
                                         out_size=out_size, hadamard=False))  # fmt: skip
