"""Cross entropy over a vocabulary whose logits never exist as a whole.

A model of this family has 103,424 words: float32 logits of 4,096 rows would take 1.7 GB, and their gradient as much again. Here rows are
taken in chunks, one buffer a chunk, and rows without a label are never computed. Two forms:

    summed_cross_entropy   weights of the rows are known beforehand: loss and gradient in one pass (three products a chunk)
    token_log_probs        the gradient of a row is known later (preference losses): logits are computed again in backward (four products)

The softmax is taken in float32 whatever the matrices are in. A packed matrix is frozen and becomes floats block by block.
Letters: T rows, R rows of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.ops import PackedWeight
from ernie45.ops.packed_dense import pulled_back
from ernie45.tokens.template import IGNORED

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 134 MB in float32. Large chunks, since each adds once to the whole gradient of the matrix."""


class SummedLoss(NamedTuple):
    """`total` = sum of weight x loss over the rows, with gradient; `nll_T` = plain loss of each row (0 where no label), without."""

    total: Tensor
    nll_T: Tensor


def summed_cross_entropy(
    h_TD: Tensor,
    weight_VD: Tensor | PackedWeight,
    labels_T: Tensor,
    row_weights_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SummedLoss:
    """Sum over rows of `row_weights * -log softmax(h @ weight.T + bias)[label]`; rows labelled `IGNORED` count nothing.

    `row_weights` is float32 [T] without gradient. The gradient is that of autograd through the plain formula.
    """
    total, nll_T = _Summed.apply(h_TD, weight_VD, bias_V, labels_T, row_weights_T, chunk_elements)
    return SummedLoss(total, nll_T)


def token_log_probs(
    h_TD: Tensor,
    weight_VD: Tensor | PackedWeight,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`log softmax(h @ weight.T + bias)[label]` of each row, float32 [T] with gradient; 0 where the label is `IGNORED`."""
    return _LogProbs.apply(h_TD, weight_VD, bias_V, labels_T, chunk_elements)


class _Chunk(NamedTuple):
    """Learned rows of one chunk. `logits` is a float32 buffer that may be written into."""

    rows_R: Tensor
    h_RD: Tensor
    labels_R: Tensor
    logits_RV: Tensor


def _chunks(
    h_TD: Tensor, weight_VD: Tensor | PackedWeight, bias_V: Tensor | None, labels_T: Tensor, chunk_elements: int
) -> Iterator[_Chunk]:
    rows_T = (labels_T != IGNORED).nonzero().squeeze(-1)
    vocab_size = weight_VD.out_size if isinstance(weight_VD, PackedWeight) else weight_VD.shape[0]
    for rows_R in rows_T.split(max(1, chunk_elements // vocab_size)):
        h_RD = h_TD[rows_R]
        yield _Chunk(rows_R, h_RD, labels_T[rows_R], _logits(h_RD, weight_VD, bias_V).float())


def _logits(h_RD: Tensor, weight_VD: Tensor | PackedWeight, bias_V: Tensor | None) -> Tensor:
    if not isinstance(weight_VD, PackedWeight):
        logits_RV = ops.wide_product(h_RD, weight_VD.t())
    else:
        logits_RV = ops.dense_linear(h_RD, weight_VD)
    return logits_RV if bias_V is None else logits_RV.add_(bias_V)


def _exponentiate(chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Turns the logits into exp(logit - max) in place. Returns their sums [R] and the loss of each row [R]."""
    own_R = chunk.logits_RV.gather(1, chunk.labels_R[:, None]).squeeze(1)
    top_R = chunk.logits_RV.amax(1)
    sums_R = chunk.logits_RV.sub_(top_R[:, None]).exp_().sum(1)
    return sums_R, sums_R.log() + top_R - own_R


class _Gradients:
    """Accumulates the gradients of `h`, the matrix and the bias over chunks; those nobody asks for are never made."""

    def __init__(self, h_TD: Tensor, weight_VD: Tensor | PackedWeight, bias_V: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.weight_VD, self.matrix_dtype = weight_VD, h_TD.dtype if isinstance(weight_VD, PackedWeight) else weight_VD.dtype
        self.h_TD = torch.zeros_like(h_TD) if wanted[0] else None
        # float32, so that a bfloat16 model does not lose what many chunks add
        learns = wanted[1] and not isinstance(weight_VD, PackedWeight)
        self.matrix_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if learns else None
        self.bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] and bias_V is not None else None

    @property
    def any(self) -> bool:
        """Whether anything is to be added at all."""
        return self.h_TD is not None or self.matrix_VD is not None or self.bias_V is not None

    def add(self, chunk: _Chunk, outer_RV: Tensor) -> None:
        """Add what the gradient of the chunk's logits brings."""
        if self.bias_V is not None:
            self.bias_V += outer_RV.sum(0)
        outer_RV = outer_RV.to(chunk.h_RD.dtype)
        if self.h_TD is not None:
            if isinstance(self.weight_VD, PackedWeight):
                self.h_TD[chunk.rows_R] = pulled_back(outer_RV, self.weight_VD, self.h_TD.shape[1])
            else:
                self.h_TD[chunk.rows_R] = outer_RV @ self.weight_VD
        if self.matrix_VD is not None:
            ops.add_product(self.matrix_VD, outer_RV.t(), chunk.h_RD)

    def narrow(self) -> None:
        """All that is to be added was added: the sums may lie in the type of the matrix."""
        if self.matrix_VD is not None:
            self.matrix_VD = self.matrix_VD.to(self.matrix_dtype)

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients times a number; the usual 1 copies nothing."""
        self.narrow()
        held = (self.h_TD, self.matrix_VD, self.bias_V)
        h_TD, matrix_VD, bias_V = held if factor.item() == 1.0 else (None if g is None else g * factor for g in held)
        return h_TD, matrix_VD, bias_V


class _Summed(torch.autograd.Function):
    """Loss and gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor | PackedWeight,
        bias_V: Tensor | None,
        labels_T: Tensor,
        row_weights_T: Tensor,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(h_TD, weight_VD, bias_V, ctx.needs_input_grad)
        nll_T = torch.zeros(labels_T.shape[0], dtype=torch.float32, device=h_TD.device)
        for chunk in _chunks(h_TD, weight_VD, bias_V, labels_T, chunk_elements):
            sums_R, nll_R = _exponentiate(chunk)
            nll_T[chunk.rows_R] = nll_R
            if gradients.any:
                weights_R = row_weights_T[chunk.rows_R]
                outer_RV = chunk.logits_RV.mul_((weights_R / sums_R)[:, None])
                outer_RV.scatter_add_(1, chunk.labels_R[:, None], -weights_R[:, None])
                gradients.add(chunk, outer_RV)
        gradients.narrow()  # now: layers keep much until their backward
        ctx.gradients = gradients
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * row_weights_T).sum(), nll_T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients.times(upstream[0]), None, None, None)


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of the labels; backward computes each chunk's logits a second time instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, weight_VD: Tensor | PackedWeight, bias_V: Tensor | None, labels_T: Tensor, chunk_elements: int
    ) -> Tensor:
        logps_T = torch.zeros(labels_T.shape[0], dtype=torch.float32, device=h_TD.device)
        for chunk in _chunks(h_TD, weight_VD, bias_V, labels_T, chunk_elements):
            logps_T[chunk.rows_R] = -_exponentiate(chunk)[1]
        ctx.packed = weight_VD if isinstance(weight_VD, PackedWeight) else None
        ctx.save_for_backward(h_TD, None if ctx.packed else weight_VD, bias_V, labels_T)
        ctx.chunk_elements = chunk_elements
        return logps_T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, whole_VD, bias_V, labels_T = ctx.saved_tensors
        weight_VD = ctx.packed or whole_VD
        gradients = _Gradients(h_TD, weight_VD, bias_V, ctx.needs_input_grad)
        for chunk in _chunks(h_TD, weight_VD, bias_V, labels_T, ctx.chunk_elements):
            sums_R, _ = _exponentiate(chunk)
            pull_R = upstream[0][chunk.rows_R]
            outer_RV = chunk.logits_RV.mul_((-pull_R / sums_R)[:, None])
            outer_RV.scatter_add_(1, chunk.labels_R[:, None], pull_R[:, None])
            gradients.add(chunk, outer_RV)
        return (*gradients.times(torch.ones(())), None, None)
