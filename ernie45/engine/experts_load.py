"""How often each expert was chosen: counted where the router chooses, one addition per layer and step; in native code, where it sorts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ernie45.engine.output import BankLoad
from ernie45.nn.moe import Router
from ernie45.ops import Routing


class ExpertsLoad:
    """Counts of a network's routers, from the moment this is made. A model without experts has none, and pays nothing."""

    def __init__(self, network: nn.Module) -> None:
        self._counts: dict[tuple[int, bool], Tensor] = {}  # by layer, and whether pictures go there
        for name, module in network.named_modules():
            if isinstance(module, Router) and name.startswith("layers."):
                counts_E = torch.zeros(module.weight.shape[0], dtype=torch.int64)
                self._counts[int(name.split(".")[1]), ".vision." in name] = counts_E
                module.register_forward_hook(_counter(counts_E))

    @property
    def text(self) -> dict[int, Tensor]:
        """The counts [E] of text's experts by layer, for whoever computes them without their routers."""
        return {layer: counts_E for (layer, vision), counts_E in self._counts.items() if not vision}

    def read(self) -> tuple[BankLoad, ...]:
        """Of each layer with experts, and each of its banks, how many tokens chose which."""
        return tuple(BankLoad(layer, tuple(counts_E.tolist()), vision) for (layer, vision), counts_E in self._counts.items())


def _counter(counts_E: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Routing], None]:
    def count(module: nn.Module, arguments: tuple[Tensor, ...], routing: Routing) -> None:
        counts_E.add_(torch.bincount(routing.experts.flatten(), minlength=len(counts_E)))

    return count
