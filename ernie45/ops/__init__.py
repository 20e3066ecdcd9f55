"""Arithmetic: `reference` says what is computed, `eager` computes it fast with stock torch. This file chooses, once."""

from ernie45.ops.eager import causal_attention, experts, linear, over_experts, rms_norm, rotate_pairs, route, swiglu
from ernie45.ops.reference import Routing

__all__ = ["Routing", "causal_attention", "experts", "linear", "over_experts", "rms_norm", "rotate_pairs", "route", "swiglu"]
