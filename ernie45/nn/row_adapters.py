"""Low-rank adapters for some rows of a step: one pass holds rows of several adapters and of the bare model.

A second network over the same weights stands beside the bare one (`beside`). Its layers compute the base for all rows at once and add, per
adapter, `B (A x)` to the rows concerned. Which rows those are is told anew for each step (`RowAdapters.tell`), and the layers of an adapter
travel with them, so that nothing is attached to the network and nothing need be taken off. Steps without adapters use the bare network.
Letters: T tokens of the step, G rows of one adapter, I and O in- and output widths, R rank, D width, F feed-forward width, E experts.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45 import ops
from ernie45.nn.attention import Attention
from ernie45.nn.layers import SwiGLU
from ernie45.nn.moe import Bank, MixtureOfExperts, Router
from ernie45.ops import Routing


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a matrix [O, I]: `b_OR @ a_RI`, its scale in `b_OR`."""

    a_RI: Tensor
    b_OR: Tensor

    def __call__(self, x_GI: Tensor) -> Tensor:
        """[G, I] -> [G, O]."""
        return F.linear(F.linear(x_GI, self.a_RI), self.b_OR)


@dataclass(frozen=True, slots=True)
class ExpertsLowRank:
    """What an adapter adds to stacked experts, by expert; an expert may have nothing."""

    gate_up: dict[int, LowRank]
    down: dict[int, LowRank]


AdapterLayers = Mapping[str, LowRank | ExpertsLowRank]
"""An adapter by the names of the modules it changes."""


class RowAdapters:
    """The rows of the step under way, by adapter. One for all layers of a network."""

    def __init__(self) -> None:
        self._rows: list[tuple[AdapterLayers, Tensor]] = []
        self._owners_T = torch.empty(0, dtype=torch.int64)

    def tell(self, groups: Sequence[tuple[AdapterLayers, Sequence[int]]], num_rows: int) -> None:
        """The adapters of the next pass, each with the numbers of its rows, of `num_rows` altogether."""
        self._rows = [(layers, torch.tensor(rows, dtype=torch.int64)) for layers, rows in groups]
        self._owners_T = torch.full((num_rows,), -1)
        for number, (_, rows_G) in enumerate(self._rows):
            self._owners_T[rows_G] = number

    def of_linear(self, name: str) -> list[tuple[LowRank, Tensor]]:
        """What is added to a layer, and to which rows."""
        found = ((layers.get(name), rows_G) for layers, rows_G in self._rows)
        return [(added, rows_G) for added, rows_G in found if isinstance(added, LowRank)]

    def of_experts(self, name: str) -> list[tuple[ExpertsLowRank, int]]:
        """What is added to experts, and the number of the owner of the rows concerned."""
        found = ((layers.get(name), number) for number, (layers, _) in enumerate(self._rows))
        return [(added, number) for added, number in found if isinstance(added, ExpertsLowRank)]

    def owners(self, rows_G: Tensor) -> Tensor:
        """The numbers of the adapters of rows; -1 for none."""
        return self._owners_T[rows_G]


class StepAdapters:
    """The rows of the step under way as the layers meet them: all of them, and apart, since each goes to a bank of experts of its own,
    those of text and those of what was seen."""

    def __init__(self) -> None:
        self.all, self.text, self.seen = RowAdapters(), RowAdapters(), RowAdapters()

    def tell(self, groups: Sequence[tuple[AdapterLayers, Sequence[int]]], num_rows: int, vision_T: Tensor | None = None) -> None:
        """As `RowAdapters.tell`; `vision` says which rows go to the vision experts; None: no row."""
        self.all.tell(groups, num_rows)
        if vision_T is None:
            self.text.tell(groups, num_rows)
            self.seen.tell((), 0)
            return
        for bank, own_T in ((self.text, ~vision_T), (self.seen, vision_T)):
            among_T = own_T.cumsum(0) - 1
            bank.tell([(layers, [int(among_T[row]) for row in rows if own_T[row]]) for layers, rows in groups], int(own_T.sum()))


class AdaptedLinear(nn.Module):
    """A linear layer of any kind, packed ones too, and what adapters add to it."""

    def __init__(self, name: str, base: nn.Module, adapters: RowAdapters) -> None:
        super().__init__()
        self.name, self.base, self._adapters = name, base, adapters

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = self.base(x_TI)
        for added, rows_G in self._adapters.of_linear(self.name):
            out_TO = out_TO.index_add(0, rows_G, added(x_TI[rows_G]).to(out_TO.dtype))
        return out_TO


class AdaptedRouter(nn.Module):
    """A router, and the choices of the rows whose adapter changes it."""

    def __init__(self, name: str, base: Router, adapters: RowAdapters) -> None:
        super().__init__()
        self.name, self.base, self._adapters = name, base, adapters

    def forward(self, x_TD: Tensor) -> Routing:
        """[T, D] -> the chosen experts and their weights, [T, C] each."""
        base, routing = self.base, self.base(x_TD)
        for added, rows_G in self._adapters.of_linear(self.name):
            if not len(rows_G):
                continue
            weight_ED = base.weight + added.b_OR.float() @ added.a_RI.float()
            own = ops.route(x_TD[rows_G], weight_ED, base.selection_bias, base.top_k, base.norm_min)
            routing.experts[rows_G], routing.weights[rows_G] = own.experts, own.weights
        return routing


class StackedExperts(Protocol):
    """Experts whose two products can be asked for one at a time: `nn.moe.Experts`, `quant.linear.QuantExperts`."""

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor: ...
    def expert_gate_up(self, number: int, x_TD: Tensor) -> Tensor: ...
    def expert_down(self, number: int, x_TF: Tensor) -> Tensor: ...


class AdaptedExperts(nn.Module):
    """Stacked experts, each run once over all its rows, and what adapters add inside."""

    def __init__(self, name: str, base: nn.Module, num_experts: int, adapters: RowAdapters) -> None:
        super().__init__()
        self.name, self.base, self._num_experts, self._adapters = name, base, num_experts, adapters

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        present = self._adapters.of_experts(self.name)
        base = cast(StackedExperts, self.base)
        if not present:
            return base(x_TD, routing)

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            owners_T = self._adapters.owners(rows_T)
            concerned = [(added, (owners_T == number).nonzero().flatten()) for added, number in present]
            gate_up_TF = base.expert_gate_up(e, part_TD)
            for added, rows_G in concerned:
                gate_up_TF = _with(added.gate_up.get(e), part_TD, rows_G, gate_up_TF)
            inner_TF = ops.swiglu(gate_up_TF)
            out_TD = base.expert_down(e, inner_TF)
            for added, rows_G in concerned:
                out_TD = _with(added.down.get(e), inner_TF, rows_G, out_TD)
            return out_TD

        return ops.over_experts(x_TD, routing, self._num_experts, expert)


def _with(added: LowRank | None, x_TI: Tensor, rows_G: Tensor, out_TO: Tensor) -> Tensor:
    if added is None or not len(rows_G):
        return out_TO
    return out_TO.index_add(0, rows_G, added(x_TI[rows_G]).to(out_TO.dtype))


def beside(network: nn.Module, adapters: StepAdapters, prepare: Callable[[nn.Module], None] = lambda network: None) -> nn.Module:
    """A second network over the same weights whose attention, feed-forwards and routers add what `adapters` tells.

    prepare: called with it before its layers are wrapped, to take fused forms apart.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    twin = copy.deepcopy(network, shared)
    prepare(twin)
    for name, owner in list(twin.named_modules()):
        if isinstance(owner, Attention):
            _wrap(owner, name, ("qkv", "out"), adapters.all)
        elif isinstance(owner, SwiGLU):
            _wrap(owner, name, ("gate_up", "down"), adapters.all)
        elif isinstance(owner, MixtureOfExperts | Bank):
            rows = adapters.text if isinstance(owner, MixtureOfExperts) else adapters.seen
            experts = AdaptedExperts(f"{name}.experts", owner.experts, owner.router.weight.shape[0], rows)
            for part, layer in (("experts", experts), ("router", AdaptedRouter(f"{name}.router", owner.router, rows))):
                setattr(owner, part, layer)
    return twin


def _wrap(owner: nn.Module, name: str, parts: tuple[str, ...], adapters: RowAdapters) -> None:
    for part in parts:
        setattr(owner, part, AdaptedLinear(f"{name}.{part}", getattr(owner, part), adapters))
