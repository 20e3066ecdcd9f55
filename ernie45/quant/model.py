"""A whole network: which of its modules a spec names, and their replacement one at a time, in place.

Only one float matrix is alive beside what is packed already: a network read from mapped files is never in memory twice.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ernie45.errors import ConfigError
from ernie45.nn.block import Block
from ernie45.nn.layers import Embedding, Linear
from ernie45.nn.moe import Experts
from ernie45.ops import PackedWeight
from ernie45.ops.codes import CodedWeight
from ernie45.quant.block import QuantBlock, can_fuse
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear, round_to_fp8
from ernie45.quant.linear import PackedMatrix, QuantEmbedding, QuantExperts, QuantLinear
from ernie45.quant.rtn import round_to_nearest
from ernie45.quant.spec import AnyScheme, Fp8Scheme, QuantSpec, Scheme

Algorithm = Callable[[Tensor, Scheme], PackedWeight | CodedWeight]


def quantisable(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that hold matrices a spec decides about.

    An embedding counts only where it is the output head too: rows that are merely looked up cost no time. Routers and norms stay whole.
    """
    tied = getattr(network, "head", None) is None
    for name, module in network.named_modules():
        if isinstance(module, Linear | Experts) or (isinstance(module, Embedding) and tied):
            yield name, module


@torch.no_grad()
def quantise_model(
    network: nn.Module, spec: QuantSpec, *, algorithm: Algorithm = round_to_nearest, each: Callable[[str], None] = lambda name: None
) -> None:
    """Replace, in place, every module the spec names by a packed one; `each` hears the name of a module before it is done.

    Raises `ConfigError` when a rule fits no module or a module no rule, before anything is changed, and `CheckpointError` for weights
    that are no numbers.
    """
    for name, scheme in decided_modules(network, spec):
        each(name)
        replace_module(network, name, _quantised(network.get_submodule(name), scheme, algorithm))
    fuse(network)


@torch.no_grad()
def prepare_model(network: nn.Module, spec: QuantSpec) -> None:
    """Replace every module the spec names by an empty packed one, to be filled from a packed checkpoint."""
    for name, scheme in decided_modules(network, spec):
        replace_module(network, name, emptied(network.get_submodule(name), scheme))
    fuse(network)


def fuse(network: nn.Module) -> None:
    """Give every block that is packed throughout its three-call form; names stay as they were."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Block) and can_fuse(module):
            replace_module(network, name, QuantBlock(module))


def unfuse(network: nn.Module) -> None:
    """What `fuse` did, undone."""
    for name, module in list(network.named_modules()):
        if isinstance(module, QuantBlock):
            replace_module(network, name, module.plain())


def decided_modules(network: nn.Module, spec: QuantSpec) -> list[tuple[str, AnyScheme]]:
    """Names of the modules that a spec quantises, with their schemes. Raises `ConfigError` as `quantise_model`."""
    names = [name for name, _ in quantisable(network)]
    spec.check(names)
    return [(name, scheme) for name in names if (scheme := spec.scheme_for(name)) is not None]


def replace_module(network: nn.Module, name: str, by: nn.Module) -> None:
    """Put `by` where the module called `name` stands."""
    parent, _, child = name.rpartition(".")
    owner = network.get_submodule(parent)
    if isinstance(owner, nn.ModuleList):
        owner[int(child)] = by
    else:
        setattr(owner, child, by)


def emptied(module: nn.Module, scheme: AnyScheme) -> nn.Module:
    """The packed module, still empty, that takes the place of a float one."""
    if isinstance(module, Experts):
        num_experts, size, expert_size = module.down.shape
        if isinstance(scheme, Fp8Scheme):
            return Fp8Experts(num_experts, size, expert_size, scheme)
        return QuantExperts(num_experts, size, expert_size, scheme)
    assert isinstance(module, Linear | Embedding)
    out_size, in_size = module.weight.shape
    if isinstance(scheme, Fp8Scheme):
        if isinstance(module, Embedding):
            raise ConfigError(f"an embedding is not stored as {scheme}; keep it whole, or take w8a8 for it")
        return Fp8Linear(in_size, out_size, scheme, bias=module.bias)
    if isinstance(module, Embedding):
        return QuantEmbedding(out_size, in_size, scheme, module.weight.dtype)
    return QuantLinear(in_size, out_size, scheme, bias=module.bias)


def _quantised(module: nn.Module, scheme: AnyScheme, algorithm: Algorithm) -> nn.Module:
    made = emptied(module, scheme)
    if isinstance(scheme, Fp8Scheme):
        return _as_fp8(module, made, scheme)
    if isinstance(made, PackedMatrix):
        assert isinstance(module, Linear | Embedding)
        made.fill(algorithm(module.weight, scheme))
        return made
    assert isinstance(module, Experts)
    assert isinstance(made, QuantExperts)
    for expert in range(module.down.shape[0]):
        gate_up, down = (algorithm(weight, scheme) for weight in module.expert(expert))
        made.fill(expert, gate_up, down)
    return made


def _as_fp8(module: nn.Module, made: nn.Module, scheme: Fp8Scheme) -> nn.Module:
    if isinstance(made, Fp8Linear):
        assert isinstance(module, Linear)
        made.fill(round_to_fp8(module.weight, scheme, None))
        return made
    assert isinstance(module, Experts)
    assert isinstance(made, Fp8Experts)
    for expert in range(module.down.shape[0]):
        gate_up, down = (round_to_fp8(weight, scheme, None) for weight in module.expert(expert))
        made.fill(expert, gate_up, down)
    return made
