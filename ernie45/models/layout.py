"""How a model splits over ranks, as data: which dimension of which tensor is shared out along which axis, and who holds which layers.

| axis | what it splits | what its ranks tell each other |
|---|---|---|
| `tensor` | attention by heads, feed-forwards by inner width, embedding and head by words | the sum behind each `out` and `down` |
| `expert` | the experts of a layer; all else is a copy, for rows of its own | tokens to the experts they chose, and back |
| `pipeline` | layers in order; the first stage embeds and sees, the last has head and predictor | states from stage to stage |
| `context` | the tokens of a row: a piece from each end, so that causal attention costs all the same | keys and values |

The table is total: a tensor that no rule covers is an error. No tensors and no processes here: what runs a split reads it, and so does
`plan.split`, which tells the bytes of a rank. Letters: V vocabulary, D width, E experts, F feed-forward width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from ernie45.errors import ConfigError
from ernie45.models.vision_config import ModelConfig

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks along each axis; one copy of the model has as many ranks as their product."""

    tensor: int = 1
    """Ranks that share every matrix."""
    expert: int = 1
    """Ranks that share the experts of a layer."""
    pipeline: int = 1
    """Ranks that hold layers one behind the other."""
    context: int = 1
    """Ranks that share the tokens of a row."""

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name} must be at least 1, not {getattr(self, name)}")

    @property
    def ranks(self) -> int:
        """Of one copy of the model."""
        return self.tensor * self.expert * self.pipeline * self.context


class Part(NamedTuple):
    """`units` pieces of `size` numbers along a dimension, which are shared out whole: heads, words, single columns."""

    units: int
    size: int = 1


class Cut(NamedTuple):
    """Dimension `dim` is shared out along `axis`; it is made of `parts`, and every rank has its share of each (queries, keys, values)."""

    axis: str
    dim: int
    parts: tuple[Part, ...]


def cuts_of(name: str, config: ModelConfig) -> tuple[Cut, ...]:
    """How the tensor `name` of a model is cut; empty for one of which every rank of a stage has a copy.

    Raises ConfigError for a tensor that the table does not know, such as a packed matrix.
    """
    for pattern, cuts in _table(config):
        if fnmatchcase(name, pattern):
            return cuts
    raise ConfigError(f"the layout over ranks has no rule for {name}; it is for models in floats that learn all their weights")


def share(part: Part, ranks: int, rank: int) -> Span:
    """What rank `rank` of `ranks` has of a part, from its first number on.

    Fewer heads of keys than ranks are copied: neighbouring ranks have the same one. Raises ConfigError where nothing comes out even.
    """
    if part.units % ranks == 0:
        own = part.units // ranks
        return rank * own * part.size, (rank + 1) * own * part.size
    if part.size > 1 and ranks % part.units == 0:
        head = rank * part.units // ranks
        return head * part.size, (head + 1) * part.size
    raise ConfigError(f"{part.units} cannot be shared out evenly among {ranks} ranks")


def spans(cut: Cut, ranks: int, rank: int) -> list[Span]:
    """What a rank has along a cut dimension: a span of each part."""
    found, start = [], 0
    for part in cut.parts:
        first, end = share(part, ranks, rank)
        found.append((start + first, start + end))
        start += part.units * part.size
    return found


def own_shape(name: str, shape: Sequence[int], config: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """The shape of what each rank of a stage holds of a tensor. Raises ConfigError, with its name, where it cannot be cut so."""
    own = list(shape)
    for cut in cuts_of(name, config):
        assert shape[cut.dim] == sum(part.units * part.size for part in cut.parts), f"{name} {list(shape)} is not what its rule says"
        ranks = getattr(layout, cut.axis)
        try:
            own[cut.dim] = sum(end - first for first, end in spans(cut, ranks, 0))
        except ConfigError as error:
            raise ConfigError(f"layout.{cut.axis} {ranks} does not suit {name} {list(shape)}: {error}") from None
    return tuple(own)


def stages(layers: int, pipeline: int) -> list[range]:
    """The layers of each stage. Where they do not come out even, stages in the middle have one more: the ends have embedding and head.

    Raises ConfigError for more stages than layers.
    """
    if pipeline > layers:
        raise ConfigError(f"layout.pipeline is {pipeline}, and the model has {layers} layers; give at most one stage to each")
    each, more = divmod(layers, pipeline)
    longer = set(sorted(range(pipeline), key=lambda stage: abs(2 * stage - pipeline + 1))[:more])
    found, start = [], 0
    for stage in range(pipeline):
        end = start + each + (stage in longer)
        found.append(range(start, end))
        start = end
    return found


def stages_of(name: str, config: ModelConfig, pipeline: int) -> tuple[int, ...]:
    """The stages that hold a tensor: one, or both ends for an embedding that the last stage needs as well."""
    first, *rest = name.split(".")
    last = pipeline - 1
    if first == "layers":
        return (next(n for n, layers in enumerate(stages(config.text.num_layers, pipeline)) if int(rest[0]) in layers),)
    if first == "embed":
        again = config.text.tie_embeddings or config.text.num_mtp > 0
        return tuple(sorted({0, last})) if again else (0,)
    return (0,) if first == "sight" else (last,)


def token_spans(tokens: int, ranks: int, rank: int) -> tuple[Span, Span]:
    """The tokens of a row that a rank of the context axis has: piece `rank` of twice as many pieces as ranks, and as far from the end."""
    edges = [tokens * n // (2 * ranks) for n in range(2 * ranks + 1)]
    far = 2 * ranks - 1 - rank
    return (edges[rank], edges[rank + 1]), (edges[far], edges[far + 1])


def _table(config: ModelConfig) -> list[tuple[str, tuple[Cut, ...]]]:
    """Pattern of names and what is cut; the first that fits counts."""
    c, e = config.text, config.text.experts
    words = (Cut("tensor", 0, (Part(c.vocab_size),)),)
    queries, keys = Part(c.num_heads, c.head_size), Part(c.num_kv_heads, c.head_size)
    rows: list[tuple[str, tuple[Cut, ...]]] = [
        ("sight.*", ()),
        ("embed.weight", words),
        ("head.weight", words),
        ("head_bias", words),
        ("*norm.weight", ()),
        ("mtp.project.weight", ()),
        ("*.attn.qkv.weight", (Cut("tensor", 0, (queries, keys, keys)),)),
        ("*.attn.qkv.bias", (Cut("tensor", 0, (queries, keys, keys)),)),
        ("*.attn.out.weight", (Cut("tensor", 1, (queries,)),)),
        ("*.attn.out.bias", ()),  # added once, behind the sum
    ]
    if e is not None:
        rows += [("*.router.*", ()), *_swiglu("*.ffn.shared", e.shared_size)]
        if config.vision is not None:
            rows += _experts("*.ffn.vision.experts", e.num_experts, config.vision.expert_size)
        rows += _experts("*.ffn.experts", e.num_experts, e.expert_size)
    return [*rows, *_swiglu("*.ffn", c.ffn_size)]


def _swiglu(name: str, inner: int) -> list[tuple[str, tuple[Cut, ...]]]:
    up = (Cut("tensor", 0, (Part(inner), Part(inner))),)
    return [
        (f"{name}.gate_up.weight", up),
        (f"{name}.gate_up.bias", up),
        (f"{name}.down.weight", (Cut("tensor", 1, (Part(inner),)),)),
        (f"{name}.down.bias", ()),
    ]


def _experts(name: str, count: int, inner: int) -> list[tuple[str, tuple[Cut, ...]]]:
    """Stacks [E, 2F, D] and [E, D, F]."""
    whole = Cut("expert", 0, (Part(count),))
    return [
        (f"{name}.gate_up", (whole, Cut("tensor", 1, (Part(inner), Part(inner))))),
        (f"{name}.down", (whole, Cut("tensor", 2, (Part(inner),)))),
    ]
