"""The product of a linear layer that learns in FP8: all three of its products multiply E4M3 numbers.

    forward   x [T, I] in tiles of 1 x 128 along I      weight [O, I] in blocks of 128 x 128
    into x    pull [T, O] in tiles of 1 x 128 along O   the same blocks, turned over
    into w    pull [O, T] in tiles of 1 x 128 along T   what x was rounded to, turned over and rounded anew along T

Sums are float32; the weight itself, its gradient and its master keep their types. Between the passes the rounded x is kept, a byte each.
Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3), ERNIE 4.5 technical report; the last product's second rounding is ERNIE's.
Letters: T tokens, I and O in- and output widths.
"""

from typing import Any

import torch
from torch import Tensor

from ernie45.ops.fp8 import INPUT_BLOCK, WEIGHT_BLOCK, Fp8Matrix, fp8_linear, from_fp8, to_fp8, turned_over


def fp8_trained_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T` in the type of `x`, rounded as above; the gradient passes the rounding as if it were none."""
    return _Product.apply(x_TI, weight_OI)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        inputs = to_fp8(x_TI, INPUT_BLOCK)
        ctx.save_for_backward(inputs.values, inputs.scales, weight_OI)
        return fp8_linear(inputs, to_fp8(weight_OI, WEIGHT_BLOCK)).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, weight_OI = ctx.saved_tensors
        (pull_TO,) = upstream
        into_x = into_weight = None
        if ctx.needs_input_grad[0]:
            weight = turned_over(to_fp8(weight_OI, WEIGHT_BLOCK))
            into_x = fp8_linear(to_fp8(pull_TO, INPUT_BLOCK), weight).to(pull_TO.dtype)
        if ctx.needs_input_grad[1]:
            x_IT = from_fp8(Fp8Matrix(values, scales, INPUT_BLOCK)).t()
            into_weight = fp8_linear(to_fp8(pull_TO.t(), INPUT_BLOCK), to_fp8(x_IT, INPUT_BLOCK)).to(weight_OI.dtype)
        return into_x, into_weight
