"""Low-rank adapters: `W x + scale * B (A x)` beside frozen weights, with one pair A, B for each matrix that files know.

A fused matrix (q, k, v, or gate and up) gets one pair a part, so that an adapter is exactly what PEFT reads and writes for the separate
matrices. Stacked experts get one pair a part and expert. `scale` is alpha / rank, or alpha / sqrt(rank) with rank stabilisation (rsLoRA).
The frozen matrices may be packed (QLoRA). Source: arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2402.09353 (DoRA), 2305.14314 (QLoRA).
Letters: T tokens, I and O in- and output widths, R rank, P parts, S = P * R rows, E experts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45 import ops
from ernie45.errors import ConfigError
from ernie45.nn.attention import Attention
from ernie45.nn.layers import Linear, SwiGLU
from ernie45.nn.moe import Bank, MixtureOfExperts
from ernie45.ops import PackedWeight, Routing


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = 8
    """Inner width of the adapters; 0 trains all weights instead."""
    alpha: float | None = None
    """Strength; by default twice the rank, and 4 with `rslora`."""
    rslora: bool = False
    """Divide alpha by the root of the rank, so that large ranks keep learning."""
    targets: Literal["all", "attention"] = "all"
    """Which linear layers get adapters: all of them, routed experts too, or those of attention."""
    vision: Literal["none", "experts", "all"] = "none"
    """In a model that sees: adapters on the vision experts too, or on these, the vision tower and the resampler."""
    dora: bool = False
    """Learn the length of every row apart from its direction (DoRA): closer to training all weights, a little slower."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank must be at least 1, or 0 to train all weights, not {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora.alpha must be a number above 0, not {self.alpha}")

    @property
    def strength(self) -> float:
        """Alpha, with its default."""
        if self.alpha is not None:
            return self.alpha
        return 4.0 if self.rslora else 2.0 * self.rank

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.strength / (math.sqrt(self.rank) if self.rslora else self.rank)


class FrozenLayer(Protocol):
    """A linear layer that stays as it is beside its adapter: `nn.layers.Linear`, or one of `quant` whose matrix is packed."""

    @property
    def bias(self) -> Tensor | None:
        """[O], where there is one."""
        ...

    @property
    def in_size(self) -> int:
        """I."""
        ...

    @property
    def out_size(self) -> int:
        """O."""
        ...

    @property
    def weight(self) -> Tensor | PackedWeight:
        """The matrix [O, I]."""
        ...

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O], differentiable."""
        ...

    def become(self, weight_OI: Tensor) -> None:
        """Take another matrix, float32 [O, I], rounded to what this one is held in."""
        ...


class FrozenExperts(Protocol):
    """Stacked experts that stay as they are: `nn.moe.Experts`, or those of `quant` whose matrices are packed."""

    num_experts: int
    size: int
    expert_size: int

    def expert(self, number: int) -> tuple[Tensor | PackedWeight, Tensor | PackedWeight]:
        """The two matrices of one expert, [2F, D] and [D, F]."""
        ...

    def become(self, number: int, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        """Take other matrices for one expert, rounded to what these are held in."""
        ...


class Pair(NamedTuple):
    """The two factors beside one matrix: A [R, I] and B [O, R]."""

    a_RI: Tensor
    b_OR: Tensor


class LoraLinear(nn.Module):
    """A frozen linear layer, whole or packed, with an adapter for each of its parts; `parts` are their rows.

    `adapter_a` is [P * R, I], part by part; `adapter_b` is [O, R]. B starts at 0, so the model starts unchanged.
    """

    def __init__(self, base: FrozenLayer, parts: tuple[int, ...], config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert sum(parts) == base.out_size, "the parts are the rows of the matrix"
        self.base, self.parts, self.rank, self.scale = base, parts, config.rank, config.scale
        self.adapter_a = nn.Parameter(_first_a((len(parts) * config.rank, base.in_size), generator))
        self.adapter_b = nn.Parameter(torch.zeros(base.out_size, config.rank))
        self.magnitude = Magnitude(_squares(base.weight, base.in_size)) if config.dora else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        inner_TS = F.linear(x_TI, self.adapter_a.to(x_TI.dtype)).flatten(0, -2)  # every part's A in one product, and every part's B
        b_SO = torch.block_diag(*self.adapter_b.to(x_TI.dtype).split(self.parts)).t()
        out_TO = self.base(x_TI) if self.magnitude is None else ops.dense_linear(x_TI, self.base.weight)
        out_TO.flatten(0, -2).addmm_(inner_TS, b_SO, alpha=self.scale)  # in place: the product beside it is read and written once
        if self.magnitude is None:
            return out_TO
        out_TO = out_TO * self.magnitude.factors(self.base.weight, self.pairs(), self.scale).to(x_TI.dtype)
        return out_TO if self.base.bias is None else out_TO + self.base.bias

    def pairs(self) -> list[Pair]:
        """A and B of each part, as views."""
        return [Pair(*pair) for pair in zip(self.adapter_a.split(self.rank), self.adapter_b.split(self.parts), strict=True)]

    @torch.no_grad()
    def merged(self) -> FrozenLayer:
        """The base with the adapter added into its weight; a packed one is rounded anew."""
        weight_OI = ops.dense(self.base.weight, self.base.in_size).float() + _delta(self.pairs(), self.scale)
        if self.magnitude is not None:
            weight_OI *= self.magnitude.factors(self.base.weight, self.pairs(), self.scale)[:, None]
        self.base.become(weight_OI)
        return self.base


class Magnitude(nn.Module):
    """DoRA's second half: the length of every row of the matrix learns apart from its direction.

    `magnitude` [O] starts as the lengths of the frozen rows. A row counts `magnitude / |w + scale * b A|`; the length below carries no
    gradient (arXiv 2402.09353, 4.3). Stacks have [E, O].
    """

    def __init__(self, squares_O: Tensor) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(squares_O.sqrt())
        self.register_buffer("squares", squares_O, persistent=False)

    def factors(self, weight: Tensor | PackedWeight, pairs: list[Pair], scale: float, expert: int | None = None) -> Tensor:
        """What every output is multiplied by, float32 [O]; no matrix of the size of `weight` is made for it."""
        magnitude_O = self.magnitude if expert is None else self.magnitude[expert]
        squares_O = self.squares if expert is None else self.squares[expert]
        with torch.no_grad():
            a_SI = torch.cat([a_RI for a_RI, _ in pairs])
            crossed = ops.dense_linear(a_SI.float(), weight).t()  # W A^T of every part, of which each uses its own rows
            changes, row = [], 0
            for part, (a_RI, b_OR) in enumerate(pairs):
                a_RI, b_OR = a_RI.float(), b_OR.float()
                own_OR = crossed[row : row + len(b_OR), part * len(a_RI) : (part + 1) * len(a_RI)]
                changes.append(((2 * scale * own_OR + scale**2 * (b_OR @ (a_RI @ a_RI.t()))) * b_OR).sum(1))
                row += len(b_OR)
            lengths_O = (squares_O + torch.cat(changes)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return magnitude_O / lengths_O


class StackedAdapter(nn.Module):
    """Adapters of E frozen matrices [O, I] of `num_parts` equal parts: `adapter_a` is [E, P * R, I], `adapter_b` is [E, O, R]."""

    def __init__(self, shape: tuple[int, int, int], num_parts: int, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        experts, out_size, in_size = shape
        self.num_parts, self.rank, self.scale = num_parts, config.rank, config.scale
        self.adapter_a = nn.Parameter(_first_a((experts, num_parts * config.rank, in_size), generator))
        self.adapter_b = nn.Parameter(torch.zeros(experts, out_size, config.rank))
        self.magnitude: Magnitude | None = None

    def pairs(self) -> list[list[Pair]]:
        """A [R, I] and B [O / P, R] of each part of each expert, as views."""
        stacks = zip(self.adapter_a.unbind(), self.adapter_b.unbind(), strict=True)
        return [[Pair(*pair) for pair in zip(a.chunk(self.num_parts), b.chunk(self.num_parts), strict=True)] for a, b in stacks]

    def product(self, x_TI: Tensor, weight: Tensor | PackedWeight, pairs: list[Pair], expert: int) -> Tensor:
        """`W x + scale * B (A x)` of one expert, part by part."""
        added = [F.linear(F.linear(x_TI, a_RI.to(x_TI.dtype)), b_OR.to(x_TI.dtype)) for a_RI, b_OR in pairs]
        out_TO = ops.dense_linear(x_TI, weight).add(torch.cat(added, dim=-1), alpha=self.scale)
        if self.magnitude is None:
            return out_TO
        return out_TO * self.magnitude.factors(weight, pairs, self.scale, expert).to(x_TI.dtype)

    def merged(self, weight: Tensor | PackedWeight, in_size: int, expert: int) -> Tensor:
        """The matrix of one expert with its adapter in it, float32 [O, I]."""
        pairs = self.pairs()[expert]
        whole_OI = ops.dense(weight, in_size).float() + _delta(pairs, self.scale)
        return whole_OI if self.magnitude is None else whole_OI * self.magnitude.factors(weight, pairs, self.scale, expert)[:, None]


class LoraExperts(nn.Module):
    """Frozen stacked experts, whole or packed, with adapters for gate, up and down."""

    def __init__(self, base: FrozenExperts, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        size, inner, experts = base.size, base.expert_size, base.num_experts
        self.gate_up = StackedAdapter((experts, 2 * inner, size), 2, config, generator)
        self.down = StackedAdapter((experts, size, inner), 1, config, generator)
        if config.dora:
            stacks = zip(*(base.expert(e) for e in range(experts)), strict=True)
            for adapter, stack, in_size in zip((self.gate_up, self.down), stacks, (size, inner), strict=True):
                adapter.magnitude = Magnitude(torch.stack([_squares(weight, in_size) for weight in stack]))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        up_pairs, down_pairs = self.gate_up.pairs(), self.down.pairs()

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            up_FD, down_DF = self.base.expert(e)
            inner_TF = ops.swiglu(self.gate_up.product(part_TD, up_FD, up_pairs[e], e))
            return self.down.product(inner_TF, down_DF, down_pairs[e], e)

        return ops.over_experts(x_TD, routing, self.base.num_experts, expert)

    @torch.no_grad()
    def merged(self) -> FrozenExperts:
        """The base with the adapters added into its matrices."""
        for e in range(self.base.num_experts):
            up_FD, down_DF = self.base.expert(e)
            self.base.become(e, self.gate_up.merged(up_FD, self.base.size, e), self.down.merged(down_DF, self.base.expert_size, e))
        return self.base


def _delta(pairs: list[Pair], scale: float) -> Tensor:
    """What adapters add to a matrix, float32 [O, I]."""
    return scale * torch.cat([b_OR.float() @ a_RI.float() for a_RI, b_OR in pairs])


def _squares(weight: Tensor | PackedWeight, in_size: int) -> Tensor:
    """The squared length of every row, float32 [O]."""
    return ops.dense(weight, in_size).detach().float().square().sum(-1)


def _first_a(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(in-width), as a fresh linear layer has it (PEFT's start too)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapt(module: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze `module` and give an adapter to every linear layer of its attention and, unless only those are wanted, of its feed-forward.

    Vision experts, which are feed-forward, get theirs where `config.vision` wants it, whatever the targets.
    """
    assert config.rank > 0, "rank 0 means no adapters"
    module.requires_grad_(False)
    for name, owner in list(module.named_modules()):
        made: dict[str, nn.Module] = {}
        if isinstance(owner, Attention):
            rows = owner.num_heads * owner.head_size, owner.num_kv_heads * owner.head_size
            made["qkv"] = LoraLinear(owner.qkv, (rows[0], rows[1], rows[1]), config, generator)
            made["out"] = LoraLinear(owner.out, (owner.out.out_size,), config, generator)
        elif isinstance(owner, Bank) and config.vision != "none":
            made["experts"] = LoraExperts(owner.experts, config, generator)
        elif config.targets == "attention":
            continue
        elif isinstance(owner, SwiGLU):
            half = owner.gate_up.out_size // 2
            made["gate_up"] = LoraLinear(owner.gate_up, (half, half), config, generator)
            made["down"] = LoraLinear(owner.down, (owner.down.out_size,), config, generator)
        elif isinstance(owner, MixtureOfExperts):
            made["experts"] = LoraExperts(owner.experts, config, generator)
        for part, layer in made.items():
            _put(module, f"{name}.{part}".lstrip("."), layer)


def adapt_linears(module: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze `module` and give an adapter to every linear layer in it, each as one matrix, as files of a vision tower have them."""
    module.requires_grad_(False)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Linear):
            _put(module, name, LoraLinear(layer, (layer.out_size,), config, generator))


def adapters(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Every adapted layer by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLinear | LoraExperts)}


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, layer)


def merge(module: nn.Module) -> None:
    """Add every adapter into the weights it stands beside and take it away; the module is then a plain one again."""
    for name, layer in adapters(module).items():
        _put(module, name, cast(nn.Module, layer.merged()))


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, the module computes what it did before the adapters: the reference policy of preference training."""
    held = adapters(module)
    for name, layer in held.items():
        _put(module, name, cast(nn.Module, layer.base))
    try:
        yield
    finally:
        for name, layer in held.items():
            _put(module, name, layer)
