"""Bytes of a model's weights under any quantisation, from its sizes alone. No tensor is made and no file is read.

Every matrix is listed by the name it has in the model, and a test compares the bytes with those of the real modules. Letters: O and I out-
and input widths, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.quant.spec import AnyScheme, Fp8Scheme, QuantSpec, Rule

_CHANNEL_STEP = 64  # as quant.pack: a row with one scale is filled up to a multiple of this
_ROWS = 16  # rows of a packed matrix are filled up to a multiple of this
SIGHT_RULES = (Rule(pattern="sight.tower.patches", scheme=None), Rule(pattern="sight.*", scheme="w8a8"))
"""What `ernie quantize` does with tower and resampler unless it is told otherwise."""


@dataclass(frozen=True)
class Matrix:
    """`copies` matrices [O, I] called `name` together, and `rest` numbers beside them that are never packed (biases)."""

    name: str
    out_size: int
    in_size: int
    copies: int = 1
    rest: int = 0

    def bytes(self, scheme: AnyScheme | None, float_bytes: int) -> int:
        """Bytes under `scheme`, scales and filling included; None: in floats."""
        if scheme is None:
            return (self.copies * self.out_size * self.in_size + self.rest) * float_bytes
        if isinstance(scheme, Fp8Scheme):
            down, across = scheme.scales(self.out_size, self.in_size)
            return self.copies * (self.out_size * self.in_size + 4 * down * across + 4 * scheme.static) + self.rest * float_bytes
        width = scheme.group or -(-self.in_size // _CHANNEL_STEP) * _CHANNEL_STEP
        groups, rows = -(-self.in_size // width), -(-self.out_size // _ROWS) * _ROWS
        if scheme.code:  # stored in two bits, and decoded to eight when it is used
            scheme = replace(scheme, weight_bits=8)
        return self.copies * (rows * groups * width * scheme.weight_bits // 8 + rows * groups * 2) + self.rest * float_bytes


def matrices(config: ModelConfig, *, mtp: bool = True) -> Iterator[Matrix]:
    """Every matrix that a quantisation spec decides about, by name, as `quant.model.quantisable` finds them."""
    c = config.text
    if c.tie_embeddings:
        yield Matrix("embed", c.vocab_size, c.hidden_size)
    else:
        yield Matrix("head", c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        yield from _layer(config, f"layers.{layer}", c.is_expert_layer(layer))
    if c.num_mtp and mtp:
        yield Matrix("mtp.project", c.hidden_size, 2 * c.hidden_size)
        yield from _layer(ModelConfig(c), "mtp.block", False)
    if config.vision:
        yield from _sight(config.vision, c.hidden_size)


def weight_bytes(config: ModelConfig, spec: QuantSpec | None = None, *, float_bytes: int = 2, mtp: bool = True) -> int:
    """Bytes of all weights. `float_bytes` is the size of what is not packed; routers are float32 whatever it says."""
    packed = sum(m.bytes(spec.scheme_for(m.name) if spec else None, float_bytes) for m in matrices(config, mtp=mtp))
    return packed + _whole(config, mtp) * float_bytes + _routers(config) * 4


def usual_spec(config: ModelConfig, scheme: str) -> QuantSpec:
    """What `ernie quantize --scheme` writes by default: head or tied embedding and sight in 8 bits, everything else as asked."""
    end = Rule(pattern="embed" if config.text.tie_embeddings else "head", scheme="w8a8")
    return QuantSpec(rules=(*(SIGHT_RULES if config.vision else ()), end, Rule(pattern="*", scheme=scheme)))


def _layer(config: ModelConfig, name: str, routed: bool) -> Iterator[Matrix]:
    c, e = config.text, config.text.experts
    bias = 1 if c.use_bias else 0
    both = c.query_size + 2 * c.kv_size
    yield Matrix(f"{name}.attn.qkv", both, c.hidden_size, rest=bias * both)
    yield Matrix(f"{name}.attn.out", c.hidden_size, c.query_size, rest=bias * c.hidden_size)
    if not routed:
        yield from _swiglu(f"{name}.ffn", c.hidden_size, c.ffn_size, bias)
        return
    assert e is not None
    yield from _experts(f"{name}.ffn.experts", c.hidden_size, e.expert_size, e.num_experts)
    if e.num_shared:
        yield from _swiglu(f"{name}.ffn.shared", c.hidden_size, e.shared_size, bias)
    if config.vision:
        yield from _experts(f"{name}.ffn.vision.experts", c.hidden_size, config.vision.expert_size, e.num_experts)


def _swiglu(name: str, size: int, inner: int, bias: int) -> Iterator[Matrix]:
    yield Matrix(f"{name}.gate_up", 2 * inner, size, rest=2 * inner * bias)
    yield Matrix(f"{name}.down", size, inner, rest=size * bias)


def _experts(name: str, size: int, inner: int, count: int) -> Iterator[Matrix]:
    yield Matrix(name, 2 * inner, size, copies=count)
    yield Matrix(name, size, inner, copies=count)


def _sight(v: VisionConfig, out_size: int) -> Iterator[Matrix]:
    def linear(name: str, inputs: int, outputs: int) -> Matrix:
        return Matrix(name, outputs, inputs, rest=outputs)

    yield Matrix("sight.tower.patches", v.size, v.patch_values)
    for block in range(v.depth):
        name = f"sight.tower.blocks.{block}"
        yield linear(f"{name}.attn.qkv", v.size, 3 * v.size)
        yield linear(f"{name}.attn.out", v.size, v.size)
        yield linear(f"{name}.up", v.size, v.ffn_size)
        yield linear(f"{name}.down", v.ffn_size, v.size)
    wide = v.joined_size
    for part, inputs in (("spatial", wide), ("temporal", 2 * wide)):
        yield linear(f"sight.resampler.{part}.first", inputs, wide)
        yield linear(f"sight.resampler.{part}.second", wide, wide)
    yield linear("sight.resampler.project", wide, out_size)


def _whole(config: ModelConfig, mtp: bool) -> int:
    """Numbers that no spec speaks of: norms, an embedding that is not the head, the head's bias."""
    c, v = config.text, config.vision
    count = c.hidden_size * (2 * c.num_layers + 1) + (c.vocab_size if c.head_bias else 0)
    count += 0 if c.tie_embeddings else c.vocab_size * c.hidden_size
    if c.num_mtp and mtp:
        count += 4 * c.hidden_size
    if v:
        count += 4 * v.size * v.depth + 2 * v.size + 2 * 2 * v.joined_size + c.hidden_size
    return count


def _routers(config: ModelConfig) -> int:
    c, e = config.text, config.text.experts
    if e is None:
        return 0
    layers = sum(c.is_expert_layer(i) for i in range(c.num_layers))
    return layers * e.num_experts * (c.hidden_size + 1) * (2 if config.vision else 1)
