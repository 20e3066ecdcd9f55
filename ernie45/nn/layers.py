"""The plain layers. Weights are created empty: they are filled from a file or by an initialiser, never by both.

Letters: T tokens, D width, F feed-forward width, V vocabulary, I and O in- and output widths.
"""

import torch
from torch import Tensor, nn

from ernie45 import ops


class Linear(nn.Module):
    """`x @ weight.T + bias`; `weight` is [O, I]."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return ops.linear(x_TI, self.weight, self.bias)

    @property
    def in_size(self) -> int:
        """I."""
        return self.weight.shape[1]

    @property
    def out_size(self) -> int:
        """O."""
        return self.weight.shape[0]

    def become(self, weight_OI: Tensor) -> None:
        """Take another matrix, in the type this one is held in."""
        self.weight.copy_(weight_OI)

    def extra_repr(self) -> str:
        """Sizes for printing."""
        return f"{self.in_size} -> {self.out_size}{'' if self.bias is None else ', bias'}"


class Embedding(nn.Module):
    """One row per token id; `weight` is [V, D]. `dtype` is the type of the rows it gives; None: the one the weight is held in."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.dtype: torch.dtype | None = None

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] int64 -> [T, D]; not scaled."""
        rows_TD = nn.functional.embedding(tokens_T, self.weight)
        return rows_TD if self.dtype is None else rows_TD.to(self.dtype)

    def scores(self, h_RD: Tensor) -> Tensor:
        """The embedding as output head, [R, D] -> [R, V]."""
        return ops.linear(h_RD, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per dimension and no bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.rms_norm(x_TD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Norm by mean and variance, with a weight and a bias per dimension; the vision tower's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return nn.functional.layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate rows first, so that `x` is read once."""

    def __init__(self, size: int, inner_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner_size, bias=bias)
        self.down = Linear(inner_size, size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down(ops.swiglu(self.gate_up(x_TD)))
