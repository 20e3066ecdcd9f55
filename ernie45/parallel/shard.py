"""Weights in shares: a rank keeps a part of every tensor, and has a whole layer only while it computes it (FSDP2, ZeRO stage 3).

Gradients come back in shares too, added in float32, and the optimiser keeps its state of the shares alone. Routers stay whole on every
rank: they are small, kept in float32 beside weights of another type, and what moves them (load, orthogonality) looks at all experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ernie45.models.text import Decoder
from ernie45.nn.moe import Router
from ernie45.parallel.ranks import Ranks

Run = Callable[..., Any]
"""Calls its first argument with the others, as one pass of a model: `run(function, *arguments)`."""


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """A pass of a model whose weights are whole."""
    return function(*arguments)


class _Pass(nn.Module):
    """Any function of a decoder as one forward pass, around which the weights outside of its layers are put together."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def shard_weights(decoder: Decoder, ranks: Ranks) -> Run:
    """Leave on this rank its share of the decoder's weights. What is computed with them must go through the `Run` that is returned.

    Do it before the optimiser is made, which then sees shares. Every rank must run the same number of passes.
    """
    assert ranks.world > 1, "a process that is alone has the whole"
    mesh = init_device_mesh("cpu", (ranks.world,))
    whole = {parameter for part in decoder.modules() if isinstance(part, Router) for parameter in part.parameters()}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*decoder.layers, *([decoder.mtp.block] if decoder.mtp is not None else [])):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    run = _Pass(decoder)
    fully_shard(run, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in run.modules():
        if isinstance(module, FSDPModule):
            # each rank's loss is divided by the counts of all ranks already, so gradients are added and not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
    run.register_forward_hook(_take_apart)
    return run


def _take_apart(run: nn.Module, inputs: object, output: object) -> None:
    """FSDP2 leaves the weights outside of the layers together for the backward pass; after a pass without gradient none comes."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, run).reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together, on every rank; one that is whole as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of this rank's share of it."""
    share = own(tensor)
    return share.numel() * share.element_size()


def own(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, or the whole of one that is not shared; writing into it writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_numbers(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, which treats every number by itself; tensors in equal shares give one in shares."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return function(*tensors)
    made = function(*map(own, tensors))
    return DTensor.from_local(made, first.device_mesh, first.placements, shape=first.shape, stride=first.stride())


def of_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`function(tensor)`, which treats the last two dimensions as matrices; the shares of a shared tensor, from which it keeps the form.

    Of a stack of matrices each rank computes its own; single matrices are put together and computed by all.
    """
    if not isinstance(tensor, DTensor):
        return function(tensor)
    if tensor.ndim > 2:
        return of_numbers(function, tensor)
    return distribute_tensor(function(tensor.full_tensor()), tensor.device_mesh, tensor.placements, src_data_rank=None)


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Norm of all gradients together, whole or in shares; not a number or infinite when any of them is."""
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in _by_kind(gradients)]
    if not norms:
        return 0.0
    return (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))).item()


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Whole tensors, and those in shares: torch's many-tensor functions do not mix them."""
    kinds = [[t for t in tensors if not isinstance(t, DTensor)], [t for t in tensors if isinstance(t, DTensor)]]
    return [cast(list[Tensor], kind) for kind in kinds if kind]
