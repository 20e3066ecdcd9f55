"""A packed network to train adapters beside (QLoRA, arXiv 2305.14314): its products are taken in floats, and let gradients through.

Serving rounds activations to whole numbers, which has no gradient; `freeze` puts layers in place that multiply by the matrix the packed one
stands for, made block by block and kept nowhere. `thaw` gives the packed layers back. Letters as in `quant.linear`.
"""

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.layers import Embedding, Linear
from ernie45.nn.moe import Experts
from ernie45.ops import PackedWeight, Routing
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from ernie45.quant.model import fuse, replace_module, unfuse
from ernie45.quant.rtn import round_to_nearest


class FrozenLinear(nn.Module):
    """A `QuantLinear` that multiplies in floats."""

    def __init__(self, packed: QuantLinear) -> None:
        super().__init__()
        self.packed, self.in_size, self.out_size, self.bias = packed, packed.in_size, packed.out_size, packed.bias

    @property
    def weight(self) -> PackedWeight:
        """The packed matrix."""
        return self.packed.weight

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = ops.dense_linear(x_TI, self.weight)
        return out_TO if self.bias is None else out_TO + self.bias

    def become(self, weight_OI: Tensor) -> None:
        """Take another matrix, rounded to nearest."""
        self.packed.fill(round_to_nearest(weight_OI, self.packed.scheme))


class FrozenExperts(nn.Module):
    """`QuantExperts` that multiply in floats."""

    def __init__(self, packed: QuantExperts) -> None:
        super().__init__()
        self.packed, self.num_experts = packed, len(packed.gate_up_packed)
        self.size, self.expert_size = packed.size, packed.expert_size

    def expert(self, number: int) -> tuple[PackedWeight, PackedWeight]:
        """The two packed matrices of one expert."""
        return self.packed.expert(number)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            gate_up, down = self.expert(e)
            return ops.dense_linear(ops.swiglu(ops.dense_linear(part_TD, gate_up)), down)

        return ops.over_experts(x_TD, routing, self.num_experts, expert)

    def become(self, number: int, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        """Take other matrices for one expert, rounded to nearest."""
        self.packed.fill(number, round_to_nearest(gate_up_FD, self.packed.scheme), round_to_nearest(down_DF, self.packed.scheme))


def freeze(network: nn.Module) -> bool:
    """Put a layer that multiplies in floats where a packed one stands. Returns whether there was any."""
    unfuse(network)
    found = {name: module for name, module in network.named_modules() if isinstance(module, QuantLinear | QuantExperts)}
    for name, module in found.items():
        replace_module(network, name, FrozenLinear(module) if isinstance(module, QuantLinear) else FrozenExperts(module))
    return bool(found)


def thaw(network: nn.Module) -> None:
    """What `freeze` did, undone: the network is as `models.load` gives it."""
    for name, module in list(network.named_modules()):
        if isinstance(module, FrozenLinear | FrozenExperts):
            replace_module(network, name, module.packed)
    fuse(network)


@torch.no_grad()
def unpack_model(network: nn.Module, dtype: torch.dtype) -> None:
    """Every packed module as the float one it stands for, in place, in `dtype`."""
    unfuse(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            replace_module(network, name, _whole(module, dtype))
        elif isinstance(module, Fp8Linear | Fp8Experts):
            replace_module(network, name, module.whole(dtype))


def _whole(packed: QuantLinear | QuantEmbedding | QuantExperts, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        if isinstance(packed, QuantExperts):
            made: nn.Module = Experts(packed.size, len(packed.gate_up_packed), packed.expert_size)
        elif isinstance(packed, QuantEmbedding):
            made = Embedding(packed.out_size, packed.in_size)
        else:
            made = Linear(packed.in_size, packed.out_size, bias=packed.bias is not None)
    made = made.to_empty(device="cpu").to(dtype)
    if isinstance(packed, QuantExperts) and isinstance(made, Experts):
        for e in range(made.num_experts):
            gate_up, down = packed.expert(e)
            made.become(e, ops.dense(gate_up, packed.size), ops.dense(down, packed.expert_size))
        return made
    assert isinstance(made, Linear | Embedding)
    assert not isinstance(packed, QuantExperts)
    made.weight.copy_(ops.dense(packed.weight, packed.in_size))
    if isinstance(packed, QuantLinear) and packed.bias is not None:
        made.bias = packed.bias
    return made
