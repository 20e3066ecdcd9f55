"""Arithmetic: `reference` and `quantised` say what is computed, `eager` and `native` compute it fast. This file chooses, once.

`KERNELS` is what was chosen: the compiled kernels, or None when they are not installed or not of this version: everything
then runs on plain PyTorch.
"""

import torch
from torch import Tensor

from ernie45.config import Environment
from ernie45.ops import eager, native, optimise, quantised
from ernie45.ops.eager import (
    causal_attention,
    framed_attention,
    over_experts,
    quick_gelu,
    rotate_halves,
    route,
)
from ernie45.ops.native import Native
from ernie45.ops.optimise import AdamwNumbers, joined, parted
from ernie45.ops.packed_dense import dense, packed_dense_linear
from ernie45.ops.quantised import PackedWeight, dequantise, dequantise_rows
from ernie45.ops.reference import Routing

__all__ = [
    "KERNELS",
    "AdamwNumbers",
    "PackedWeight",
    "Routing",
    "adamw",
    "add_product",
    "causal_attention",
    "dense",
    "dense_linear",
    "dequantise",
    "dequantise_rows",
    "describe",
    "experts",
    "framed_attention",
    "joined",
    "linear",
    "over_experts",
    "packed_feed_forward",
    "packed_linear",
    "packed_linear_add",
    "packed_qkv",
    "packed_swiglu",
    "paged_attention",
    "parted",
    "quick_gelu",
    "rms_norm",
    "rotate_halves",
    "rotate_pairs",
    "route",
    "swiglu",
    "wide_product",
]

_ISA = Environment.read().isa
KERNELS: Native | None = native.load(_ISA, native.find_library())

# The same names whichever was chosen; the contracts stand in `reference` and `quantised`.
linear = KERNELS.linear if KERNELS else eager.linear
rms_norm = KERNELS.rms_norm if KERNELS else eager.rms_norm
rotate_pairs = KERNELS.rotate_pairs if KERNELS else eager.rotate_pairs
swiglu = KERNELS.swiglu if KERNELS else eager.swiglu
wide_product = KERNELS.wide_product if KERNELS else eager.wide_product
add_product = KERNELS.add_product if KERNELS else eager.add_product
experts = KERNELS.experts if KERNELS else eager.experts
adamw = KERNELS.adamw if KERNELS else optimise.adamw
_chosen = KERNELS or quantised
packed_linear = _chosen.packed_linear
packed_linear_add = _chosen.packed_linear_add
packed_qkv = _chosen.packed_qkv
packed_swiglu = _chosen.packed_swiglu
packed_feed_forward = _chosen.packed_feed_forward
paged_attention = _chosen.paged_attention


def dense_linear(x_TI: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`x @ weight.T` in floats for a frozen weight, whole or packed, with the gradient of `x`."""
    return packed_dense_linear(x_TI, weight) if isinstance(weight, PackedWeight) else linear(x_TI, weight)


def describe() -> str:
    """One line that says what computes, for a person: whose kernels, for which instruction set, on how many threads."""
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    if KERNELS is None:
        why = "ERNIE45_ISA=python" if _ISA == "python" else native.obstacle(native.find_library())
        return f"plain PyTorch, {threads} ({why})"
    others = ", ".join(name for name in KERNELS.available if name != KERNELS.isa)
    return f"native kernels for {KERNELS.isa}{f' (also here: {others})' if others else ''}, {threads}"
