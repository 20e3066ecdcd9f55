"""Matrices and statistics in the turned basis that a scheme with `-h` rounds in.

x W^T = (x R)(W R)^T for an orthogonal R; R is block-diagonal with Hadamard matrices, so that one group's few large inputs are spread over
the group (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, has R over the whole width). Letters: O and I out- and input widths.
"""

import torch
from torch import Tensor

from ernie45.ops.quantised import turn_by_hadamard
from ernie45.quant.pack import group_width
from ernie45.quant.spec import AnyScheme


def turned(matrix_OI: Tensor, scheme: AnyScheme) -> Tensor:
    """W R, filled up to whole groups; W itself where the scheme does not turn."""
    if not scheme.hadamard:
        return matrix_OI
    width = group_width(matrix_OI.shape[1], scheme.group)
    return turn_by_hadamard(torch.nn.functional.pad(matrix_OI, (0, -matrix_OI.shape[1] % width)), width)


def turned_gram(gram_II: Tensor, scheme: AnyScheme) -> Tensor:
    """R^T H R, the Gram matrix of x R; also for sums of x' x^T."""
    return turned(turned(gram_II, scheme).t().contiguous(), scheme).t() if scheme.hadamard else gram_II


def turned_back(matrix_OI: Tensor, scheme: AnyScheme, in_size: int) -> Tensor:
    """The W that `turned` was given."""
    return turn_by_hadamard(matrix_OI, group_width(in_size, scheme.group))[:, :in_size] if scheme.hadamard else matrix_OI
