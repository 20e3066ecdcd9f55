"""The arithmetic of the family, written plainly: every fast path is compared with these functions.

Letters: T tokens, S keys in sight, D width, N query heads, K key heads, H head size, P = H / 2 pairs, F feed-forward width, E experts,
C chosen experts per token, I and O in- and output widths. Formulas: ERNIE 4.5 technical report and the published modelling files; where
backends round differently, the choice made here is stated.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Routing(NamedTuple):
    """Where each token goes: expert ids [T, C] int64, best biased score first, and their weights [T, C] float32, each row summing to 1."""

    experts: Tensor
    weights: Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, [T, I] -> [T, O] in the type of `x`.

    A bfloat16 weight may meet float32 activations: it is widened, which is exact, and everything is computed in float32.
    """
    return F.linear(x_TI, weight_OI.to(x_TI.dtype), bias_O)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, [T, D] -> [T, D] in the type of `x`.

    The mean of squares is taken in float32 and the normed value is cast back *before* it meets the weight, as the published code does;
    an all-float32 kernel rounds differently in bfloat16.
    """
    x32 = x_TD.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def rotate_pairs(x_TNH: Tensor, turns_TP: Tensor) -> Tensor:
    """Turn each adjacent pair of dimensions (2i, 2i + 1) by its angle, [T, N, H] -> [T, N, H] in the type of `x`.

    `turns` is complex64 [T, P], cos + i sin of the angle. The turn is computed in float32 and cast back.
    """
    even, odd = x_TNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns_TP.real[:, None, :], turns_TP.imag[:, None, :]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x_TNH.dtype)


def rotate_halves(x_TNH: Tensor, turns_TP: Tensor) -> Tensor:
    """Turn the pairs of dimensions (i, i + P) by their angles, [T, N, H] -> [T, N, H] in the type of `x`; the vision tower's pairing.

    `turns` is complex64 [T, P]. The turn is computed in float32 and cast back.
    """
    first, second = x_TNH.float().chunk(2, dim=-1)
    cos, sin = turns_TP.real[:, None, :], turns_TP.imag[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)


def quick_gelu(x_TF: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the vision tower's activation."""
    return x_TF * torch.sigmoid(1.702 * x_TF)


def framed_attention(q_GLNH: Tensor, k_GLNH: Tensor, v_GLNH: Tensor) -> Tensor:
    """Attention of every token of a frame to all tokens of that frame, G frames of L tokens, [G, L, N, H]; computed in float32.

    Scores are scaled by 1 / sqrt(H).
    """
    scores = torch.einsum("glnh,gsnh->gnls", q_GLNH.float(), k_GLNH.float()) * q_GLNH.shape[-1] ** -0.5
    return torch.einsum("gnls,gsnh->glnh", scores.softmax(dim=-1), v_GLNH.float()).to(q_GLNH.dtype)


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of a [T, 2F] tensor whose first half is the gate, -> [T, F]."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(x_TD: Tensor, weight_ED: Tensor, selection_bias_E: Tensor, top_k: int, norm_min: float) -> Routing:
    """Choose `top_k` experts per token.

    Scores are a float32 softmax over all experts. The bias takes part in the choice alone, never in the weights; the weights are the chosen
    scores divided by their sum, which is kept at or above `norm_min`.
    """
    scores_TE = F.linear(x_TD.float(), weight_ED).softmax(dim=-1)
    chosen_TC = torch.topk(scores_TE + selection_bias_E, top_k, dim=-1).indices
    weights_TC = scores_TE.gather(-1, chosen_TC)
    return Routing(chosen_TC, weights_TC / weights_TC.sum(-1, keepdim=True).clamp(min=norm_min))


def experts(x_TD: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU, [T, D] -> [T, D]; no token is dropped.

    `gate_up` is [E, 2F, D] with the gate rows first, `down` is [E, D, F]. Experts add to the result in ascending order.
    """
    out_TD = torch.zeros_like(x_TD)
    weights_TC = routing.weights.to(x_TD.dtype)
    for expert in routing.experts.unique().tolist():
        rows, slots = torch.where(routing.experts == expert)
        h_RD = linear(swiglu(linear(x_TD[rows], gate_up_EFD[expert])), down_EDF[expert])
        out_TD = out_TD.index_add(0, rows, h_RD * weights_TC[rows, slots, None])
    return out_TD


def causal_attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
    """Causal grouped-query attention over one document, [T, N, H] -> [T, N, H].

    The T queries are the last of the S positions: query t sees keys 0 .. S - T + t. Query head n uses key head `n // (N / K)`. Scores are
    scaled by 1 / sqrt(H); everything is computed in float32.
    """
    T, N, H = q_TNH.shape
    S, K, _ = k_SKH.shape
    q = q_TNH.reshape(T, K, N // K, H).float()
    scores = torch.einsum("tkgh,skh->kgts", q, k_SKH.float()) * H**-0.5
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgts,skh->tkgh", weights, v_SKH.float()).reshape(T, N, H).to(q_TNH.dtype)
