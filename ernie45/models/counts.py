"""Parameters and bytes of a model, from its sizes alone: no tensor is made.

Letters in the formulas: D width, F feed-forward width, E experts, V vocabulary. A test sums the real modules and finds the same totals.
"""

from dataclasses import dataclass

from ernie45.models.config import TextConfig
from ernie45.models.released import Release
from ernie45.models.vision_config import VisionConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model by part, and how many of them one text token meets.

    `total` leaves the multi-token prediction block (`mtp`) out, as the published sizes do. `active` is per text token without embedding and
    head; `active_with_head` adds the head matrix.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    routed_experts: int
    shared_experts: int
    routers: int
    norms: int
    vision_experts: int
    vision_tower: int
    resampler: int
    mtp: int
    active: int
    active_with_head: int

    @property
    def total(self) -> int:
        """All parameters but the MTP block."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense
            + self.routed_experts
            + self.shared_experts
            + self.routers
            + self.norms
            + self.vision_experts
            + self.vision_tower
            + self.resampler
        )


def count_parameters(text: TextConfig, vision: VisionConfig | None = None) -> ParameterCount:
    """Count a text decoder, or a vision-language model when `vision` is given."""
    c, e = text, text.experts
    expert_layers = sum(c.is_expert_layer(i) for i in range(c.num_layers))
    attention = _attention(c) * c.num_layers
    dense = _swiglu(c.hidden_size, c.ffn_size, c.use_bias) * (c.num_layers - expert_layers)
    norms = c.hidden_size * (2 * c.num_layers + 1)
    banks = 2 if vision else 1
    router = expert = shared = vision_expert = chosen = 0
    if e:
        router = e.num_experts * (c.hidden_size + 1)  # one row and one selection bias per expert
        expert = _swiglu(c.hidden_size, e.expert_size)
        shared = _swiglu(c.hidden_size, e.shared_size, c.use_bias) if e.num_shared else 0
        chosen = e.top_k * expert + shared + router
        vision_expert = _swiglu(c.hidden_size, vision.expert_size) if vision else 0
    head_bias = c.vocab_size if c.head_bias else 0
    active = attention + dense + norms + expert_layers * chosen
    head_matrix = c.vocab_size * c.hidden_size
    return ParameterCount(
        embedding=head_matrix,
        head=(0 if c.tie_embeddings else head_matrix) + head_bias,
        attention=attention,
        dense=dense,
        routed_experts=expert_layers * expert * (e.num_experts if e else 0),
        shared_experts=expert_layers * shared,
        routers=expert_layers * router * banks,
        norms=norms,
        vision_experts=expert_layers * vision_expert * (e.num_experts if e else 0),
        vision_tower=_tower(vision) if vision else 0,
        resampler=_resampler(vision, c.hidden_size) if vision else 0,
        mtp=_mtp(c) if c.num_mtp else 0,
        active=active,
        active_with_head=active + head_matrix + head_bias,
    )


def count_release(release: Release) -> ParameterCount:
    """Count a published checkpoint."""
    return count_parameters(release.text, release.vision)


def kv_bytes_per_token(text: TextConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one more token of context costs: keys and values of every layer of the trunk."""
    return 2 * text.num_layers * text.kv_size * bytes_per_value


def weight_bytes(count: ParameterCount, bits: float) -> int:
    """Bytes of all weights, MTP included, at `bits` a parameter, without the scales that a quantised file adds."""
    return round((count.total + count.mtp) * bits / 8)


def _attention(c: TextConfig) -> int:
    bias = (c.query_size + 2 * c.kv_size + c.hidden_size) if c.use_bias else 0
    return c.hidden_size * (2 * c.query_size + 2 * c.kv_size) + bias


def _swiglu(size: int, inner: int, bias: bool = False) -> int:
    return 3 * size * inner + (2 * inner + size if bias else 0)


def _mtp(c: TextConfig) -> int:
    # two input norms, the projection, and one dense block with its own two norms; final norm and head are the trunk's
    block = _attention(c) + _swiglu(c.hidden_size, c.ffn_size, c.use_bias) + 2 * c.hidden_size
    return 2 * c.hidden_size + 2 * c.hidden_size * c.hidden_size + block


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _tower(v: VisionConfig) -> int:
    norms = 4 * v.size
    block = norms + _linear(v.size, 3 * v.size) + _linear(v.size, v.size) + _linear(v.size, v.ffn_size) + _linear(v.ffn_size, v.size)
    return v.patch_size**2 * v.channels * v.size + v.depth * block + 2 * v.size


def _resampler(v: VisionConfig, size: int) -> int:
    wide = v.size * v.merge**2
    spatial = 2 * _linear(wide, wide) + 2 * wide
    temporal = _linear(2 * wide, wide) + _linear(wide, wide) + 2 * wide
    return spatial + temporal + _linear(wide, size) + size
