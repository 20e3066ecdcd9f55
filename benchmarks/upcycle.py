"""A mixture of experts made from the starter's real weights, as a test bed for quantising routed experts.

python benchmarks/upcycle.py OUT [--layers-from 1] [--noise 0.02]

In each layer the feed-forward is cut into two halves of its neurons, and each half becomes two experts: itself with a little noise, twice.
The router has four rows a, -a, b, -b, so the two largest scores are always |a x| and |b x|: one copy of each half, which one depends on the
token. Weights of the two chosen are near one half each, and `down` is doubled for that. So the mixture computes nearly what the starter
does, with experts that differ only by their noise: it tests packing, routing and calibration per expert on real weights, and says nothing
about how well a trained mixture takes few bits.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from ernie45.config import Environment
from ernie45.models.config import ExpertsConfig
from ernie45.models.load import find_model, load_model
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.nn.layers import SwiGLU
from ernie45.nn.moe import MixtureOfExperts

_ROUTER_STD = 0.004  # of a router weight: scores stay small, and the two chosen experts near one half each


def upcycled(dense: Decoder, first_layer: int, noise: float, generator: torch.Generator) -> Decoder:
    """The mixture, float32. `noise` is the share of each weight's standard deviation by which the copies differ."""
    config = dense.config
    experts = ExpertsConfig(
        num_experts=4, top_k=2, expert_size=config.ffn_size // 2, num_shared=0, first_layer=first_layer, last_layer=config.num_layers - 1
    )
    mixture = Decoder(replace(config, experts=experts)).eval().requires_grad_(False)
    taken = {name: value for name, value in dense.state_dict().items() if name in mixture.state_dict()}
    mixture.load_state_dict(taken, strict=False)
    for layer in range(first_layer, config.num_layers):
        old, new = dense.layers[layer].ffn, mixture.layers[layer].ffn
        assert isinstance(old, SwiGLU)
        assert isinstance(new, MixtureOfExperts)
        _fill(new, old, noise, generator)
    return mixture


def _fill(new: MixtureOfExperts, old: SwiGLU, noise: float, generator: torch.Generator) -> None:
    gates, ups = old.gate_up.weight.chunk(2)
    for half, (gate, up, down) in enumerate(zip(gates.chunk(2), ups.chunk(2), old.down.weight.chunk(2, dim=1), strict=True)):
        for copy in range(2):
            new.experts.gate_up[2 * half + copy] = _shaken(torch.cat((gate, up)), noise, generator)
            new.experts.down[2 * half + copy] = _shaken(2 * down, noise, generator)
        direction = torch.randn(gate.shape[1], generator=generator) * _ROUTER_STD
        new.router.weight[2 * half], new.router.weight[2 * half + 1] = direction, -direction
    new.router.selection_bias.zero_()


def _shaken(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return matrix + noise * matrix.std() * torch.randn(matrix.shape, generator=generator)


def main() -> None:
    """Make the folder; tokenizer and card come with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers-from", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.02)
    args = parser.parse_args()
    folder = find_model("starter", Environment.read())
    mixture = upcycled(load_model(folder), args.layers_from, args.noise, torch.Generator().manual_seed(0))
    save_model(mixture, args.out, companions=folder)
    print(f"{args.out}: {sum(value.numel() for value in mixture.state_dict().values()):,} numbers")


if __name__ == "__main__":
    main()
