"""The same arithmetic as `reference`, arranged so that stock torch runs it fast on a CPU; differentiable throughout.

Each function has the contract of its twin in `reference`; `tests/ops` compares them. The comments give the measurement behind a choice
(2 cores, AVX-512, weights read from memory; see `docs/log.md`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ernie45.ops import learned
from ernie45.ops.reference import Routing, quick_gelu, route

__all__ = [
    "Routing",
    "causal_attention",
    "experts",
    "framed_attention",
    "linear",
    "over_experts",
    "quick_gelu",
    "rms_norm",
    "rotate_halves",
    "rotate_pairs",
    "route",
    "swiglu",
]

# Elements of a bfloat16 weight that are widened at a time for float32 activations: a megabyte, still in the cache when it is read.
_WIDENED = 1 << 18
# Up to this many rows the weight is the larger operand and a product with the weight on the left reads it 1.3 to 1.6 times as fast.
_FEW_ROWS = 32


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, [T, I] -> [T, O] in the type of `x`; a bfloat16 weight is widened for float32 activations."""
    if weight_OI.dtype != x_TI.dtype:
        return _widened(x_TI, weight_OI, bias_O)
    rows = x_TI.shape[0]
    if rows > _FEW_ROWS:
        return F.linear(x_TI, weight_OI, bias_O)
    if rows == 1:  # bfloat16: 14 GB/s of weights against 9.6 through F.linear; float32: equal
        out_TO = torch.mv(weight_OI, x_TI[0])[None]
    else:
        out_TO = torch.mm(weight_OI, x_TI.t()).t().contiguous()
    return out_TO if bias_O is None else out_TO + bias_O


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` as float32."""
    return (left @ right).float()


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to float32 sums, in place."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def _widened(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` for a weight that is held in fewer bits than `x`: the whole of it never stands in memory in the type of `x`."""
    step = max(1, _WIDENED // weight_OI.shape[1])
    out_TO = torch.cat([F.linear(x_TI, weight_RI.to(x_TI.dtype)) for weight_RI in weight_OI.split(step)], dim=1)
    return out_TO if bias_O is None else out_TO + bias_O


def _learned(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted, by a model that computes in a type that models are kept in (twins in float64 are autograd's)."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, [T, D] -> [T, D] in the type of `x`."""
    if _learned(x_TD, weight_D):
        return learned.RMSNorm.apply(x_TD, weight_D, eps)
    if x_TD.dtype == torch.float32:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    # the cast stands before the weight, see the reference
    return weight_D * F.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype)


def rotate_pairs(x_TNH: Tensor, turns_TP: Tensor) -> Tensor:
    """Turn adjacent pairs by complex multiplication: 4 to 25 times as fast as the written-out form."""
    pairs = torch.view_as_complex(x_TNH.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_TP[:, None, :]).flatten(-2).to(x_TNH.dtype)


def rotate_halves(x_TNH: Tensor, turns_TP: Tensor) -> Tensor:
    """Turn the pairs (i, i + P) by complex multiplication."""
    first, second = x_TNH.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns_TP[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_TNH.dtype)


def framed_attention(q_GLNH: Tensor, k_GLNH: Tensor, v_GLNH: Tensor) -> Tensor:
    """Attention inside each of G frames of L tokens, [G, L, N, H]; no mask is made."""
    q, k, v = (x.transpose(1, 2) for x in (q_GLNH, k_GLNH, v_GLNH))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of a [T, 2F] tensor whose first half is the gate, -> [T, F]."""
    if _learned(gate_up_TF):
        return learned.SwiGLU.apply(gate_up_TF)
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate) * up


Product = Callable[[Tensor, Tensor], Tensor]


def experts(
    x_TD: Tensor,
    routing: Routing,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    product: Product = linear,
    gated: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU, [T, D] -> [T, D]; `product` is how rows meet a matrix, `gated` how SwiGLU is computed."""
    # unbound once: the gradient of `stack[e]` is a whole stack of zeros for every expert, that of `unbind` is one stack
    ups, downs = gate_up_EFD.unbind(), down_EDF.unbind()
    return over_experts(x_TD, routing, len(ups), lambda e, rows_T, part_TD: product(gated(product(part_TD, ups[e])), downs[e]))


def over_experts(x_TD: Tensor, routing: Routing, num_experts: int, expert: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Sort the (token, expert) pairs by expert, run each chosen expert once over its own rows, add the weighted rows back.

    `expert` gets its number, the numbers of its rows, and the rows.
    """
    chosen = routing.experts.flatten()
    order = chosen.argsort(stable=True)
    rows = order // routing.experts.shape[1]
    counts = torch.bincount(chosen, minlength=num_experts).tolist()
    parts = zip(rows.split(counts), x_TD[rows].split(counts), strict=True)
    done = [expert(e, rows_T, part_TD) for e, (rows_T, part_TD) in enumerate(parts) if counts[e]]
    weights = routing.weights.flatten()[order].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, rows, torch.cat(done) * weights[:, None])


def causal_attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
    """Causal grouped-query attention over one document whose last T positions ask, [T, N, H] -> [T, N, H]."""
    T, N, H = q_TNH.shape
    S, K, _ = k_SKH.shape
    if T == 1:  # all heads of a group ask the same keys: one product per key head, nothing is repeated
        q_KGH = q_TNH.view(K, N // K, H)
        scores_KGS = torch.bmm(q_KGH, k_SKH.permute(1, 2, 0)).float() * H**-0.5
        return torch.bmm(scores_KGS.softmax(-1).to(q_TNH.dtype), v_SKH.transpose(0, 1)).view(1, N, H)
    if S == T <= learned.CausalAttention.MOST_TOKENS and q_TNH.is_cpu and _learned(q_TNH, k_SKH, v_SKH):
        return learned.CausalAttention.apply(q_TNH, k_SKH, v_SKH)
    group = N // K
    q = q_TNH.transpose(0, 1)[None]
    k, v = (t.transpose(0, 1)[:, None].expand(K, group, S, H).reshape(1, N, S, H) for t in (k_SKH, v_SKH))
    if S == T:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out[0].transpose(0, 1)
