"""Matrices outside the decoder's blocks, calibrated on what passes them: the vision tower and the resampler, on pictures.

Matrices are done a group at a time, those of one numbered part together, in the order of the pass: a group sees inputs that carry the
errors of the groups before it. Nothing is widened here: what feeds these matrices are norms with a bias, and AWQ's factors are not worth a
second kind of folding at the 8 bits that towers usually keep.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ernie45.nn.layers import Linear
from ernie45.quant.calibrate import InputStatistics
from ernie45.quant.methods import MatrixReport, Method, fill_linear, round_matrix
from ernie45.quant.model import emptied, quantisable, replace_module
from ernie45.quant.spec import AnyScheme


@torch.inference_mode()
def quantise_watched(
    network: nn.Module, part: str, passes: Sequence[Callable[[], object]], schemes: Mapping[str, AnyScheme | None], method: Method
) -> tuple[MatrixReport, ...]:
    """Replace the matrices of the module `part` to which `schemes` (by full name) gives one, in place; returns what that cost.

    Each of `passes` sends some inputs through the whole of `part`. Raises `CheckpointError` for inputs that are no numbers.
    """
    names = [name for name, _ in quantisable(network) if name.startswith(f"{part}.") and schemes[name] is not None]
    reports: list[MatrixReport] = []
    for _, group in itertools.groupby(names, key=_group_of):
        for name, seen in _observed(network, list(group), passes).items():
            module, scheme = network.get_submodule(name), schemes[name]
            assert isinstance(module, Linear)
            assert scheme is not None
            packed, costs = round_matrix(module.weight, scheme, method, seen)
            made = emptied(module, scheme)
            fill_linear(made, packed)
            replace_module(network, name, made)
            reports.append(costs.report(name, scheme, method, None, seen.tokens))
    return tuple(reports)


def _group_of(name: str) -> str:
    """The name up to its number, `tower.blocks.3`; without one all but its last word."""
    words = name.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:-1])


class _Enough(Exception):
    """No error: it ends a pass whose rest nobody needs."""


def _observed(network: nn.Module, names: Sequence[str], passes: Sequence[Callable[[], object]]) -> dict[str, InputStatistics]:
    """What the matrices `names` receive in all passes."""
    found: dict[str, InputStatistics] = {}
    for name in names:
        module = network.get_submodule(name)
        assert isinstance(module, Linear)
        found[name] = InputStatistics(module.weight.shape[1])
    for each in passes:
        reached: set[str] = set()
        handles = [network.get_submodule(name).register_forward_pre_hook(hook) for name, hook in _hooks(found, reached)]
        try:
            each()
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        assert reached == set(names), f"of {names} only {sorted(reached)} were reached"
    return found


def _hooks(found: Mapping[str, InputStatistics], reached: set[str]) -> Iterator[tuple[str, Callable[..., None]]]:
    def watching(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].flatten(0, -2)
            found[name].add(x_TI, x_TI, torch.ones(len(x_TI)), name)
            reached.add(name)
            if len(reached) == len(found):
                raise _Enough

        return hook

    return ((name, watching(name)) for name in found)
