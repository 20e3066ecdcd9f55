"""The mixture of experts: a float32 router, stacked experts, and a shared SwiGLU beside them.

A vision-language model has a second bank, router and experts of their own, for the tokens that were seen: routing never crosses from one
modality to the other, and the shared SwiGLU serves both (ERNIE 4.5 technical report, modality-isolated routing).
Letters: T tokens, D width, F width of one expert, E experts, C chosen experts per token, R some of the T rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.layers import SwiGLU
from ernie45.ops import Routing


@dataclass(frozen=True)
class Modality:
    """Which rows of a pass are text and which are seen, int64 [R] each; together all rows, both ascending."""

    text_R: Tensor
    vision_R: Tensor

    @classmethod
    def of(cls, vision_T: Tensor | None) -> "Modality | None":
        """From a mask of the seen tokens, bool [T]; None when there are none, which is the text path."""
        if vision_T is None or not bool(vision_T.any()):
            return None
        return cls(torch.nonzero(~vision_T).flatten(), torch.nonzero(vision_T).flatten())


class Router(nn.Module):
    """Softmax router in float32, whatever the model computes in.

    `selection_bias` takes part in the choice of experts and not in their weights; it is moved by measured load, not by gradient.
    """

    def __init__(self, size: int, num_experts: int, *, top_k: int, norm_min: float) -> None:
        super().__init__()
        self.top_k, self.norm_min = top_k, norm_min
        self.weight = nn.Parameter(torch.empty(num_experts, size, dtype=torch.float32))
        self.selection_bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Routing:
        """[T, D] -> the chosen experts and their weights, [T, C] each."""
        return ops.route(x_TD, self.weight, self.selection_bias, self.top_k, self.norm_min)


class Experts(nn.Module):
    """E SwiGLUs in two stacked tensors: `gate_up` [E, 2F, D] with the gate rows first, `down` [E, D, F]."""

    def __init__(self, size: int, num_experts: int, expert_size: int) -> None:
        super().__init__()
        self.size, self.num_experts, self.expert_size = size, num_experts, expert_size
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_size, size))
        self.down = nn.Parameter(torch.empty(num_experts, size, expert_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D], the weighted sum of each token's experts."""
        return ops.experts(x_TD, routing, self.gate_up, self.down)

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """The two matrices of one expert, [2F, D] and [D, F]."""
        return self.gate_up[number], self.down[number]

    def become(self, number: int, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        """Take other matrices for one expert, in the type these are held in."""
        self.gate_up[number] = gate_up_FD
        self.down[number] = down_DF

    def expert_gate_up(self, number: int, x_TD: Tensor) -> Tensor:
        """The first product of one expert, [T, D] -> [T, 2F]."""
        return ops.linear(x_TD, self.gate_up[number])

    def expert_down(self, number: int, x_TF: Tensor) -> Tensor:
        """The second product of one expert, [T, F] -> [T, D]."""
        return ops.linear(x_TF, self.down[number])


class Bank(nn.Module):
    """A router and its experts."""

    def __init__(self, size: int, *, num_experts: int, top_k: int, expert_size: int, norm_min: float) -> None:
        super().__init__()
        self.router = Router(size, num_experts, top_k=top_k, norm_min=norm_min)
        self.experts = Experts(size, num_experts, expert_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.experts(x_TD, self.router(x_TD))


class MixtureOfExperts(nn.Module):
    """Routed experts plus, where `shared_size` is not 0, one ungated SwiGLU that every token passes.

    `vision_size` is the width of the experts of a second bank, for seen tokens; 0 makes none.
    """

    def __init__(
        self,
        size: int,
        *,
        num_experts: int,
        top_k: int,
        expert_size: int,
        shared_size: int,
        norm_min: float,
        shared_bias: bool = False,
        vision_size: int = 0,
    ) -> None:
        super().__init__()
        self.router = Router(size, num_experts, top_k=top_k, norm_min=norm_min)
        self.experts = Experts(size, num_experts, expert_size)
        self.shared = SwiGLU(size, shared_size, bias=shared_bias) if shared_size else None
        bank = Bank(size, num_experts=num_experts, top_k=top_k, expert_size=vision_size, norm_min=norm_min) if vision_size else None
        self.vision = bank

    def forward(self, x_TD: Tensor, modality: Modality | None = None) -> Tensor:
        """[T, D] -> [T, D]; `modality` says which rows the second bank takes, None: no row."""
        routed_TD = self._text(x_TD) if modality is None else self._both(x_TD, modality)
        return routed_TD if self.shared is None else routed_TD + self.shared(x_TD)

    def _text(self, x_TD: Tensor) -> Tensor:
        return self.experts(x_TD, self.router(x_TD))

    def _both(self, x_TD: Tensor, modality: Modality) -> Tensor:
        assert self.vision is not None, "seen tokens need the vision experts, which this model has not"
        seen_RD = self.vision(x_TD[modality.vision_R])
        if not len(modality.text_R):
            return seen_RD
        routed_TD = torch.empty_like(x_TD).index_copy(0, modality.vision_R, seen_RD)
        return routed_TD.index_copy(0, modality.text_R, self._text(x_TD[modality.text_R]))
