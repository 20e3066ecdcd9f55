"""The mixture of experts: a float32 router, stacked experts, and a shared SwiGLU beside them.

Letters: T tokens, D width, F width of one expert, E experts, C chosen experts per token.
"""

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.layers import SwiGLU
from ernie45.ops import Routing


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
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_size, size))
        self.down = nn.Parameter(torch.empty(num_experts, size, expert_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D], the weighted sum of each token's experts."""
        return ops.experts(x_TD, routing, self.gate_up, self.down)

    def expert_gate_up(self, number: int, x_TD: Tensor) -> Tensor:
        """The first product of one expert, [T, D] -> [T, 2F]."""
        return ops.linear(x_TD, self.gate_up[number])

    def expert_down(self, number: int, x_TF: Tensor) -> Tensor:
        """The second product of one expert, [T, F] -> [T, D]."""
        return ops.linear(x_TF, self.down[number])


class MixtureOfExperts(nn.Module):
    """Routed experts plus, where `shared_size` is not 0, one ungated SwiGLU that every token passes."""

    def __init__(
        self, size: int, *, num_experts: int, top_k: int, expert_size: int, shared_size: int, norm_min: float, shared_bias: bool = False
    ) -> None:
        super().__init__()
        self.router = Router(size, num_experts, top_k=top_k, norm_min=norm_min)
        self.experts = Experts(size, num_experts, expert_size)
        self.shared = SwiGLU(size, shared_size, bias=shared_bias) if shared_size else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        routed_TD = self.experts(x_TD, self.router(x_TD))
        return routed_TD if self.shared is None else routed_TD + self.shared(x_TD)
