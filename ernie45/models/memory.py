"""Whether a model fits, from its sizes alone: the bytes of its weights under any quantisation, of its cache, and of the work beside them.

No tensor is made and no file is read, so it can be said before either. Every matrix is listed by the name it has in the model, and a test
compares the bytes with those of the real modules. Letters: O and I out- and input widths, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.quant.spec import QuantSpec, Rule, Scheme

_CHANNEL_STEP = 64  # as quant.pack: a row with one scale is filled up to a multiple of this
_ROWS = 16  # rows of a packed matrix are filled up to a multiple of this
COMPUTE_BYTES = {"bfloat16": 2, "float32": 4}
"""Bytes of a number by the type a model computes in."""
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

    def bytes(self, scheme: Scheme | None, float_bytes: int) -> int:
        """Bytes under `scheme`, scales and filling included; None: in floats."""
        if scheme is None:
            return (self.copies * self.out_size * self.in_size + self.rest) * float_bytes
        width = scheme.group or -(-self.in_size // _CHANNEL_STEP) * _CHANNEL_STEP
        groups, rows = -(-self.in_size // width), -(-self.out_size // _ROWS) * _ROWS
        return self.copies * (rows * groups * width * scheme.weight_bits // 8 + rows * groups * 2) + self.rest * float_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a model takes, in bytes: `weights`, the `sight` among them (tower, resampler, vision experts), keys and values, and work.

    `work` is what one step holds beside them: hidden states and logits of the rows of a step, or the widest values inside the vision tower
    for the largest picture, whichever is more. It is an estimate; the others are exact.
    """

    weights: int
    sight: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.work

    def __str__(self) -> str:
        seen = f" (of them {_gib(self.sight)} to see)" if self.sight else ""
        return f"{_gib(self.total)}: weights {_gib(self.weights)}{seen}, cache {_gib(self.cache)}, work {_gib(self.work)}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run a model: how it is stored, with or without what it needs to see, and what that takes."""

    name: str
    scheme: str | None
    text_only: bool
    plan: MemoryPlan


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


def plan_memory(
    config: ModelConfig,
    spec: QuantSpec | None = None,
    *,
    float_bytes: int = 2,
    context: int = 8192,
    kv_bytes: int = 2,
    step_tokens: int = 2048,
    mtp: bool = True,
) -> MemoryPlan:
    """What `config` takes with `context` tokens in the cache (of all requests together) and steps of `step_tokens`."""
    text = config.text
    weights = weight_bytes(config, spec, float_bytes=float_bytes, mtp=mtp)
    alone = weight_bytes(replace(config, vision=None), spec, float_bytes=float_bytes, mtp=mtp)
    work = step_tokens * (4 * text.hidden_size + 3 * max(text.ffn_size, text.query_size)) * float_bytes + 64 * text.vocab_size * 4
    if config.vision:
        work = max(work, _picture_work(config.vision, float_bytes))
    return MemoryPlan(weights=weights, sight=weights - alone, cache=context * kv_bytes_per_token(text, kv_bytes), work=work)


def choices(config: ModelConfig, *, float_bytes: int = 2, context: int = 8192) -> list[Choice]:
    """Ways to run a model, the most exact first: as floats, in 8 and in 4 bits, and each without what it needs to see."""
    found = []
    for name, scheme in ((f"{8 * float_bytes}-bit floats", None), ("8 bits", "w8a8-g64"), ("4 bits", "w4a8-g64")):
        for text_only in (False, True) if config.vision else (False,):
            asked = replace(config, vision=None) if text_only else config
            plan = plan_memory(asked, usual_spec(asked, scheme) if scheme else None, float_bytes=float_bytes, context=context)
            found.append(Choice(name=name + (", text only" if text_only else ""), scheme=scheme, text_only=text_only, plan=plan))
    return found


def usual_spec(config: ModelConfig, scheme: str) -> QuantSpec:
    """What `ernie quantize --scheme` writes by default: head or tied embedding and sight in 8 bits, everything else as asked."""
    end = Rule(pattern="embed" if config.text.tie_embeddings else "head", scheme="w8a8")
    return QuantSpec(rules=(*(SIGHT_RULES if config.vision else ()), end, Rule(pattern="*", scheme=scheme)))


def advice(config: ModelConfig, available: int, *, float_bytes: int = 2, context: int = 8192) -> list[str]:
    """What fits into `available` bytes, in sentences with numbers: the most exact choice, or by how much the smallest one does not."""
    every = choices(config, float_bytes=float_bytes, context=context)
    fitting = [choice for choice in every if choice.plan.total <= available]
    seeing = next((choice for choice in fitting if not choice.text_only), None)
    if not fitting:
        least = min(every, key=lambda choice: choice.plan.total)
        return [f"nothing fits into {_gib(available)}: even {least.name} takes {least.plan}"]
    lines = []
    if seeing:
        lines.append(f"{seeing.name} fit into {_gib(available)}: {seeing.plan}" + _how(seeing))
    elif config.vision:
        lines.append(f"with its eyes it does not fit into {_gib(available)}")
    if config.vision:
        text = next(choice for choice in fitting if choice.text_only)
        if seeing is None or every.index(text) < every.index(seeing):
            lines.append(f"{text.name} fit: {text.plan}{_how(text)}")
    return lines


def _how(choice: Choice) -> str:
    steps = ([f"ernie quantize --scheme {choice.scheme.partition('-')[0]}"] if choice.scheme else []) + (
        ["load with text_only"] if choice.text_only else []
    )
    return f" ({', '.join(steps)})" if steps else ""


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


def _picture_work(v: VisionConfig, float_bytes: int) -> int:
    """The widest moment of the tower for the largest picture that the published processor makes."""
    patches = 6177 * v.merge**2
    return patches * (v.ffn_size + 5 * v.size) * float_bytes + patches * 3 * v.size * 4


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
