"""How fast a model could be at most, given what a machine can do: bytes that must be read, products that must be made.

Decoding reads every weight it touches and the sequence's cache once a step, of a head that few sequences need the best token of its
sketch alone; reading a prompt is bound by the products. Nothing is taken off for norms, sampling or Python, so no engine reaches 100 %.
"""

from dataclasses import dataclass

import torch

from ernie45 import ops
from ernie45.models.config import TextConfig
from ernie45.models.counts import count_parameters, kv_bytes_per_token
from ernie45.models.packed import PACKED_ENDING
from ernie45.models.text import Decoder
from ernie45.ops.network import SKETCHED_ROWS, unread_bytes
from ernie45.quant.linear import PackedMatrix
from ernie45.recipes.bench.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What speed depends on in a loaded model. Bytes: `always` are read every step, `routed` are those of all experts together, `unread`
    are those of the head that a sketch spares greedy steps of few sequences."""

    model: TextConfig
    dtype: torch.dtype
    packed: bool
    always: int
    routed: int
    unread: int

    @classmethod
    def of(cls, decoder: Decoder) -> "Footprint":
        """Of a decoder, by the tensors it really holds. Its predictor is left out, and so is an embedding that is only looked up."""
        always = routed = 0
        packed = False
        for name, value in decoder.state_dict().items():
            packed |= name.endswith(PACKED_ENDING)
            if name.startswith("mtp.") or (name.startswith("embed.") and decoder.head is not None):
                continue
            if ".experts." in name:
                routed += value.nbytes
            else:
                always += value.nbytes
        head = decoder.embed if decoder.head is None else decoder.head
        unread = unread_bytes(head.weight) if ops.KERNELS is not None and isinstance(head, PackedMatrix) else 0
        return cls(model=decoder.config, dtype=decoder.dtype, packed=packed, always=always, routed=routed, unread=unread)

    def step_bytes(self, batch: int, context: int) -> float:
        """Bytes that a decode step of `batch` sequences with `context` tokens each reads; of the experts those that chance would choose."""
        experts = self.model.experts
        touched = 1 - (1 - experts.top_k / experts.num_experts) ** batch if experts else 0.0
        always = self.always - (self.unread if batch <= SKETCHED_ROWS else 0)
        return always + self.routed * touched + batch * context * kv_bytes_per_token(self.model, self.dtype.itemsize)

    def decode_limit(self, limits: Limits, batch: int, context: int) -> float:
        """Tokens a second that `batch` sequences together could write at most."""
        operations = 2 * count_parameters(self.model).active_with_head * batch
        return batch / max(self.step_bytes(batch, context) / (limits.read_gb_per_s * 1e9), operations / self._peak(limits))

    def prefill_limit(self, limits: Limits, prompt: int) -> float:
        """Prompt tokens a second that could be read at most; every token attends half of its prompt on average."""
        products = 2 * count_parameters(self.model).active / self._peak(limits)
        attended = 2 * self.model.num_layers * self.model.query_size * prompt / self._float_peak(limits)
        return 1 / (products + attended)

    def _peak(self, limits: Limits) -> float:
        return limits.int8_gops * 1e9 if self.packed else self._float_peak(limits)

    def _float_peak(self, limits: Limits) -> float:
        # bfloat16 weights under float32: three bfloat16 products each, where that is faster
        float32 = max(limits.float32_gflops, limits.bfloat16_gflops / 3)
        return (limits.bfloat16_gflops if self.dtype == torch.bfloat16 else float32) * 1e9
