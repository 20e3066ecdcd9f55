"""Low-rank adapters: `W x + scale * B (A x)` beside frozen weights, with one pair A, B for each matrix that files know.

A fused matrix (q, k, v, or gate and up) gets one pair a part, so that an adapter is exactly what PEFT reads and writes for the separate
matrices. Stacked experts get one pair a part and expert. `scale` is alpha / rank, or alpha / sqrt(rank) with rank stabilisation (rsLoRA).
Source: arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA). Letters: T tokens, I and O in- and output widths, R rank, P parts, E experts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45 import ops
from ernie45.errors import ConfigError
from ernie45.nn.attention import Attention
from ernie45.nn.layers import Linear, SwiGLU
from ernie45.nn.moe import Experts, MixtureOfExperts
from ernie45.ops import Routing


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


class LoraLinear(nn.Module):
    """A frozen `Linear` with an adapter for each of its parts; `parts` are their rows.

    `adapter_a` is [P * R, I], part by part; `adapter_b` is [O, R]. B starts at 0, so the model starts unchanged.
    """

    def __init__(self, base: Linear, parts: tuple[int, ...], config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        out_size, in_size = base.weight.shape
        assert sum(parts) == out_size, "the parts are the rows of the matrix"
        self.base, self.parts, self.rank, self.scale = base, parts, config.rank, config.scale
        self.adapter_a = nn.Parameter(_first_a((len(parts) * config.rank, in_size), base.weight, generator))
        self.adapter_b = nn.Parameter(base.weight.new_zeros(out_size, config.rank))

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        inner = F.linear(x_TI, self.adapter_a).split(self.rank, dim=-1)  # every part's A in one product
        added = [F.linear(i_TR, b_OR) for i_TR, b_OR in zip(inner, self.adapter_b.split(self.parts), strict=True)]
        return self.base(x_TI).add(torch.cat(added, dim=-1) if len(added) > 1 else added[0], alpha=self.scale)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32 [O, I]."""
        pairs = zip(self.adapter_a.split(self.rank), self.adapter_b.split(self.parts), strict=True)
        return self.scale * torch.cat([b_OR.float() @ a_RI.float() for a_RI, b_OR in pairs])

    def merged(self) -> Linear:
        """The base with the adapter added into its weight."""
        with torch.no_grad():
            self.base.weight.copy_(self.base.weight.float() + self.delta())
        return self.base


class StackedAdapter(nn.Module):
    """Adapters of a stack of matrices [E, O, I] of `num_parts` equal parts: `adapter_a` is [E, P * R, I], `adapter_b` is [E, O, R]."""

    def __init__(self, stack_EOI: Tensor, num_parts: int, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        experts, out_size, in_size = stack_EOI.shape
        self.num_parts, self.rank, self.scale = num_parts, config.rank, config.scale
        self.adapter_a = nn.Parameter(_first_a((experts, num_parts * config.rank, in_size), stack_EOI, generator))
        self.adapter_b = nn.Parameter(stack_EOI.new_zeros(experts, out_size, config.rank))

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        """A [R, I] and B [O / P, R] of each part of each expert, as views."""
        stacks = zip(self.adapter_a.unbind(), self.adapter_b.unbind(), strict=True)
        return [list(zip(a.chunk(self.num_parts), b.chunk(self.num_parts), strict=True)) for a, b in stacks]

    def delta(self) -> Tensor:
        """What the adapters add to the stack, float32 [E, O, I]."""
        return self.scale * torch.stack([torch.cat([b.float() @ a.float() for a, b in parts]) for parts in self.pairs()])


def _with_pairs(x_TI: Tensor, weight_OI: Tensor, pairs: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """`W x + scale * B (A x)`, part by part."""
    added = [F.linear(F.linear(x_TI, a_RI), b_OR) for a_RI, b_OR in pairs]
    return ops.linear(x_TI, weight_OI).add(torch.cat(added, dim=-1), alpha=scale)


class LoraExperts(nn.Module):
    """Frozen stacked experts with adapters for gate, up and down."""

    def __init__(self, base: Experts, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.gate_up = StackedAdapter(base.gate_up, 2, config, generator)
        self.down = StackedAdapter(base.down, 1, config, generator)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        up_EFD, down_EDF = self.base.gate_up.unbind(), self.base.down.unbind()
        up_pairs, down_pairs = self.gate_up.pairs(), self.down.pairs()

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            inner_TF = ops.swiglu(_with_pairs(part_TD, up_EFD[e], up_pairs[e], self.gate_up.scale))
            return _with_pairs(inner_TF, down_EDF[e], down_pairs[e], self.down.scale)

        return ops.over_experts(x_TD, routing, len(up_EFD), expert)

    def merged(self) -> Experts:
        """The base with the adapters added into its stacks."""
        with torch.no_grad():
            for stack, adapter in ((self.base.gate_up, self.gate_up), (self.base.down, self.down)):
                stack.copy_(stack.float() + adapter.delta())
        return self.base


def _first_a(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(in-width), as a fresh linear layer has it (PEFT's start too)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(like.dtype)


def adapt(module: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze `module` and give an adapter to every linear layer of its attention and, unless only those are wanted, of its feed-forward."""
    assert config.rank > 0, "rank 0 means no adapters"
    module.requires_grad_(False)
    for name, owner in list(module.named_modules()):
        made: dict[str, nn.Module] = {}
        if isinstance(owner, Attention):
            rows = owner.num_heads * owner.head_size, owner.num_kv_heads * owner.head_size
            made["qkv"] = LoraLinear(owner.qkv, (rows[0], rows[1], rows[1]), config, generator)
            made["out"] = LoraLinear(owner.out, (owner.out.weight.shape[0],), config, generator)
        elif config.targets == "attention":
            continue
        elif isinstance(owner, SwiGLU):
            half = owner.gate_up.weight.shape[0] // 2
            made["gate_up"] = LoraLinear(owner.gate_up, (half, half), config, generator)
            made["down"] = LoraLinear(owner.down, (owner.down.weight.shape[0],), config, generator)
        elif isinstance(owner, MixtureOfExperts):
            made["experts"] = LoraExperts(owner.experts, config, generator)
        for part, layer in made.items():
            _put(module, f"{name}.{part}".lstrip("."), layer)


def adapters(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Every adapted layer by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLinear | LoraExperts)}


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, layer)


def merge(module: nn.Module) -> None:
    """Add every adapter into the weights it stands beside and take it away; the module is then a plain one again."""
    for name, layer in adapters(module).items():
        _put(module, name, layer.merged())


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, the module computes what it did before the adapters: the reference policy of preference training."""
    held = adapters(module)
    for name, layer in held.items():
        _put(module, name, layer.base)
    try:
        yield
    finally:
        for name, layer in held.items():
            _put(module, name, layer)
