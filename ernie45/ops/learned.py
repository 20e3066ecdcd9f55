"""Layers with a gradient written by hand: row work keeps its input and nothing else, where autograd keeps what lies between.

Forward of row work does the operations of `eager`, to the bit; backward makes what it needs again, which takes less time than memory that
is new to the process. Letters: T tokens, D width, F feed-forward width, I and O in- and output widths.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear(torch.autograd.Function):
    """`x @ weight.T` of matrices by a product that takes either factor by rows or by columns, for all three products of a layer."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x_needed, weight_needed, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_TI if weight_needed else None, weight_OI if x_needed else None)
        ctx.product = product
        return product(x_TI, weight_OI.t())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI, weight_OI), (pull_TO,) = ctx.saved_tensors, upstream
        into_x = ctx.product(pull_TO, weight_OI) if weight_OI is not None else None
        return into_x, ctx.product(pull_TO.t(), x_TI) if x_TI is not None else None, None


class SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` of [T, 2F], gate first."""

    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (gate_up_TF,), (pull_TF,) = ctx.saved_tensors, upstream
        into = torch.empty_like(gate_up_TF)
        (gate, up), (into_gate, into_up) = gate_up_TF.chunk(2, dim=-1), into.chunk(2, dim=-1)
        torch.mul(pull_TF, F.silu(gate), out=into_up)
        torch.ops.aten.silu_backward.grad_input(pull_TF * up, gate, grad_input=into_gate)
        return into


class RMSNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x ** 2) + eps)`, the quotient in float32 and rounded to the type of `x` before it meets the weight."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return weight_D * F.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, weight_D), (pull_TD,) = ctx.saved_tensors, upstream
        wide_TD = x_TD.float()
        inverse_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1]).add_(ctx.eps).rsqrt_()
        normed_TD = wide_TD * inverse_T1
        into_weight = (pull_TD * normed_TD).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        into_TD = pull_TD.float() * weight_D
        shared_T1 = (into_TD * normed_TD).mean(-1, keepdim=True)
        into_TD.sub_(normed_TD.mul_(shared_T1)).mul_(inverse_T1)
        return into_TD.to(x_TD.dtype), into_weight, None


_ROWS = 128
"""Queries whose weights backward holds at once."""


class CausalAttention(torch.autograd.Function):
    """Attention of one document: torch's forward, and a backward in which the query heads of a key head are rows of one product.

    Torch's backward takes keys and values repeated for every query head, and small products: of 512 tokens, 16 heads of 128 and 2 key
    heads, in bfloat16, it takes about twice as long. Kept are queries, keys, values and the logarithms of the sums, float32 [N, T].
    N query heads, K key heads, G = N / K, H head size, R queries at once, L keys that they see.
    """

    MOST_TOKENS = 1024  # beyond, torch's backward is the faster

    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        T, N, H = q_TNH.shape
        K = k_TKH.shape[1]
        k, v = (x.transpose(0, 1)[:, None].expand(K, N // K, T, H).reshape(1, N, T, H) for x in (k_TKH, v_TKH))
        out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_TNH.transpose(0, 1)[None], k, v, 0.0, True)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, logs[0])
        return out[0].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        q_TNH, k_TKH, v_TKH, logs_NT = ctx.saved_tensors
        (T, N, H), K, scale = q_TNH.shape, k_TKH.shape[1], q_TNH.shape[-1] ** -0.5
        k_KTH, v_KTH = (x.transpose(0, 1).contiguous() for x in (k_TKH, v_TKH))
        logs_KT1 = logs_NT.unflatten(0, (K, -1)).transpose(1, 2).reshape(K, -1, 1).to(q_TNH.dtype)  # by token, then by head
        into_q = torch.empty_like(q_TNH)
        into_k, into_v = (torch.zeros(K, T, H, dtype=torch.float32) for _ in range(2))
        for first in range(0, T, _ROWS):
            end = min(T, first + _ROWS)
            q_KRH, pull_KRH = (_by_key_head(x[first:end], K) for x in (q_TNH, upstream[0]))
            # less the row's logarithm, scores are near 0 where weights are large: rounded to bfloat16 they stay exact where it counts
            logs_KR1 = logs_KT1[:, first * N // K : end * N // K]
            scores_KRL = torch.baddbmm(logs_KR1, q_KRH, k_KTH[:, :end].mT, beta=-1, alpha=scale)
            unseen_R1R = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)[:, None]
            scores_KRL.unflatten(1, (end - first, -1))[..., first:].masked_fill_(unseen_R1R, float("-inf"))
            weights_KRL = scores_KRL.softmax(-1)
            into_v[:, :end] += weights_KRL.mT @ pull_KRH
            pull_KRL = torch._softmax_backward_data(pull_KRH @ v_KTH[:, :end].mT, weights_KRL, -1, weights_KRL.dtype)
            into_q[first:end] = (pull_KRL @ k_KTH[:, :end]).mul_(scale).unflatten(1, (end - first, -1)).transpose(0, 1).flatten(1, 2)
            into_k[:, :end] += pull_KRL.mT @ q_KRH
        return into_q, *(x.transpose(0, 1).to(k_TKH.dtype) for x in (into_k.mul_(scale), into_v))


def _by_key_head(x_RNH: Tensor, K: int) -> Tensor:
    """[R, N, H] -> [K, R * G, H]."""
    return x_RNH.unflatten(1, (K, -1)).transpose(0, 1).flatten(1, 2)
