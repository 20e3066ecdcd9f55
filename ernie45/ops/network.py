"""A whole network as the kernels hold it: opened from its matrices once, then computed a step at a time in one call.

A matrix is packed or whole, which is bfloat16 [O, I]; whole ones are read where they lie, nothing of them is copied. What a step computes
is what the decoder over the same cache computes layer by layer, which is its plain twin; the arithmetic of the parts stands in `quantised`
and `reference`. Norms, activations and the cache share one type.

Letters: T tokens of the step, R requests, P pages, A rows whose next token is wanted, D width, V vocabulary, N query heads, K key heads,
H head size, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.ops.native import Native
from ernie45.ops.quantised import PackedWeight

SKETCHED_ROWS = 8
"""So many rows' best tokens are found by the head's sketch (kernels/src/sketch.h); more read the whole head."""


def unread_bytes(head: PackedWeight) -> int:
    """Bytes of an output head that its sketch spares a step, but for the few rows that are computed whole."""
    return head.values.nbytes // 2 if head.bits == 8 and not head.float_inputs else 0


class NetworkSizes(NamedTuple):
    """What the tensors alone do not say. `eps` is that of every norm."""

    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float


Matrix = Tensor | PackedWeight
"""A weight [O, I]: whole, in bfloat16, or packed."""


class ExpertStack(NamedTuple):
    """Routed experts of one layer: router [E, D] and selection bias [E] in float32, stacked matrices, and how they are chosen.

    `gate_up` and `down`: the experts' matrices stacked, and their scales where they are packed, which is what `format` then is of.
    counts: int64 [E] to which every step adds how often each was chosen, where someone counts.
    """

    router_ED: Tensor
    bias_E: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    format: int
    inner_size: int
    top_k: int
    norm_min: float
    counts_E: Tensor | None = None


class StepResult(NamedTuple):
    """What a step brought: hidden states [T, D] before the final norm; of the wanted rows float32 logits [A, V], rounded to the network's
    type, the place of the best [A] and its logit [A] (NaN where a logit is no number). No logits where the caller owns the head, or where
    only the best were wanted and they were found without them.
    """

    hidden_TD: Tensor
    logits_RV: Tensor | None
    best_R: Tensor
    best_logit_R: Tensor


class Network:
    """The kernels' view of a network; it keeps the matrices it was given alive."""

    def __init__(self, kernels: Native, sizes: NetworkSizes, final_norm_D: Tensor, turns_P: Tensor) -> None:
        """`turns_P`: the rotary frequencies, float32 [H / 2]."""
        self._isa, self._frequencies_P = kernels.isa, turns_P
        self._data = torch.ops.ernie45.network(
            final_norm_D, sizes.eps, sizes.num_layers, sizes.vocab_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_size
        )
        self._kept: list[object] = [final_norm_D]

    def set_embedding(self, rows: Matrix) -> None:
        """Rows [V, D] in the network's type or in bfloat16, or packed."""
        torch.ops.ernie45.set_embedding(self._data, *_parts(rows))
        self._kept.append(rows)

    def set_head(self, weight: Matrix) -> None:
        """The output head [V, D]. Without it a step returns no logits. One of 8 bits is sketched in 4 more, see kernels/src/sketch.h."""
        torch.ops.ernie45.set_head(self._data, *_parts(weight))
        self._kept += weight, torch.ops.ernie45.sketch_head(self._data)

    def set_attention(self, layer: int, norm_D: Tensor, qkv: Matrix, out: Matrix) -> None:
        """Attention of layer `layer` (from 0), with the norm before it."""
        torch.ops.ernie45.set_attention(self._data, layer, norm_D, *_parts(qkv), *_parts(out))
        self._kept += norm_D, qkv, out

    def set_feed_forward(self, layer: int, norm_D: Tensor, gate_up: Matrix, down: Matrix) -> None:
        """The dense feed-forward of a layer with the norm before it, or the shared experts beside its routed ones."""
        inner_size = (gate_up.out_size if isinstance(gate_up, PackedWeight) else len(gate_up)) // 2
        torch.ops.ernie45.set_feed_forward(self._data, layer, norm_D, *_parts(gate_up), *_parts(down), inner_size)
        self._kept += norm_D, gate_up, down

    def set_experts(self, layer: int, norm_D: Tensor, experts: ExpertStack) -> None:
        """The routed experts of a layer, with the norm before them."""
        e = experts
        torch.ops.ernie45.set_experts(
            self._data, layer, norm_D, e.router_ED, e.bias_E, *e.gate_up, *e.down, e.format, e.inner_size, e.top_k, e.norm_min, e.counts_E
        )
        self._kept += norm_D, experts

    def step(
        self, tokens_T: Tensor, positions_T: Tensor, slots_T: Tensor, cache: Tensor, places_R3: Tensor, pages_RP: Tensor, page_size: int,
        answers_A: Tensor, only_best: bool = False,
    ) -> StepResult:  # fmt: skip
        """One step: every row attends its request's keys up to itself, in the pages of `cache` [layers, 2, slots, K, H].

        places: first row, end and start position of each request; rows stand in the order of requests. Integers are int64. only_best: the
        logits of other tokens are not wanted. Raises RuntimeError for tokens, slots, pages or rows that do not exist.
        """
        angles_TP = positions_T[:, None].float() * self._frequencies_P
        turns_TP2 = torch.stack((angles_TP.cos(), angles_TP.sin()), dim=-1)
        hidden_TD, logits_AV, best_A, best_logit_A = torch.ops.ernie45.step(
            self._data, tokens_T, turns_TP2, slots_T, cache, places_R3, pages_RP, page_size, answers_A, only_best, self._isa
        )
        return StepResult(hidden_TD, logits_AV if len(logits_AV) == len(answers_A) else None, best_A, best_logit_A)


def _parts(matrix: Matrix) -> tuple[Tensor, Tensor | None, int]:
    """Values, scales and format, as the kernels take them."""
    return (matrix.values, matrix.scales, matrix.format) if isinstance(matrix, PackedWeight) else (matrix, None, 0)
