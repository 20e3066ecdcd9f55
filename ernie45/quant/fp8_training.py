"""Feed-forward layers that learn in FP8: their weights stay as they are and every product they take part in is one of E4M3 numbers.

As in ERNIE 4.5 the matrices of the feed-forward learn so, experts too; attention, router, norms, embedding and head do not. What is
rounded, and how, stands in `ops/fp8_training.py`. Letters: T tokens, D width, I and O in- and output widths.
"""

from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.layers import Linear, SwiGLU
from ernie45.nn.moe import Experts
from ernie45.ops import Routing
from ernie45.ops.fp8_training import fp8_trained_linear
from ernie45.quant.model import replace_module


class Fp8TrainedLinear(nn.Module):
    """A `Linear` with the same parameters under the same names, whose products are in FP8."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = fp8_trained_linear(x_TI, self.weight)
        return out_TO if self.bias is None else out_TO + self.bias


class Fp8TrainedExperts(nn.Module):
    """`Experts` with the same parameters under the same names, whose products are in FP8."""

    def __init__(self, base: Experts) -> None:
        super().__init__()
        self.gate_up, self.down = base.gate_up, base.down

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.eager.experts(x_TD, routing, self.gate_up, self.down, fp8_trained_linear)


def train_in_fp8(network: nn.Module) -> list[str]:
    """Let all feed-forward layers of `network` learn in FP8. Returns their names."""
    changed = []
    for owner, module in list(network.named_modules()):
        if isinstance(module, SwiGLU):
            changed += [f"{owner}.gate_up", f"{owner}.down"]
        elif isinstance(module, Experts):
            changed.append(owner)
    for name in changed:
        module = network.get_submodule(name)
        assert isinstance(module, Linear | Experts), f"'{name}' is not a layer with weights that learn"
        replace_module(network, name, Fp8TrainedExperts(module) if isinstance(module, Experts) else Fp8TrainedLinear(module))
    return changed
