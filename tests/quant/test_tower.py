"""A packed vision tower, layer by layer: against the same tower with its weights made floats again, and the one it came from."""

import copy

import pytest
import torch

from ernie45.models.text import fill_initial
from ernie45.models.vision import Tower, TowerBlock
from ernie45.models.vision_config import VisionConfig
from ernie45.ops.quantised import dequantise
from ernie45.quant.linear import QuantLinear
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule

GRIDS = [(1, 6, 4), (3, 4, 4)]


def floats() -> Tower:
    """Weights and norms large enough that every part moves the result."""
    made = Tower(VisionConfig(depth=2, size=64, num_heads=4, ffn_size=160, patch_size=4, expert_size=16))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.requires_grad_(False).named_parameters():
        fill_initial(name, parameter, generator)
        parameter += torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.1)
    return made.eval()


def widened(packed: Tower, like: Tower) -> Tower:
    """`like` with the numbers that the packed tower holds."""
    made = copy.deepcopy(like)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            plain = made.get_submodule(name)
            plain.weight.data = dequantise(module.weight)[:, : plain.weight.shape[1]].contiguous()
    return made


# A weight of 4 bits in groups is off by up to 1/14 of the group's largest, of 8 bits by 1/254: about 1/9 and 1/150 of a usual one.
# Activations of 16 bits stay floats, so only the order of sums differs; of 8 bits they are off by up to 1/254 of a row's largest, in the
# four products of each of two blocks.
@pytest.mark.parametrize(
    ("scheme", "to_own", "to_floats"),
    [
        ("w8a8", 0.03, 0.03),
        ("w8a8-g32", 0.02, 0.02),
        ("w8a16-g64", 1e-5, 0.02),
        ("w4a8", 0.03, 0.35),
        ("w4a8-g32", 0.02, 0.25),
        ("w4a8-h", 0.03, 0.35),
        ("w4a16-g32", 1e-5, 0.25),
    ],
)
@torch.inference_mode()
def test_a_packed_tower_is_its_weights_made_floats(scheme, to_own, to_floats):
    original, packed = floats(), floats()
    quantise_model(packed, QuantSpec(rules=(Rule(pattern="patches", scheme=None), Rule(pattern="*", scheme=scheme))))
    assert all(isinstance(block, TowerBlock) and block.calls() is block for block in packed.blocks), "in float32 no kernel takes a block"
    patches_SC = torch.randn(24 + 48, 48, generator=torch.Generator().manual_seed(1))
    want, own, got = (tower(patches_SC, GRIDS) for tower in (original, widened(packed, original), packed))
    assert (got - own).norm() <= to_own * own.norm()
    assert 1e-4 * want.norm() < (got - want).norm() <= to_floats * want.norm()
