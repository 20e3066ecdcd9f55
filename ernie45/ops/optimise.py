"""One step of AdamW over one tensor, and weights that are float32 in two halves.

A bfloat16 weight is the upper half of the float32 number it stands for, rounded; the optimiser keeps what is lacking as a difference of
the bits, int16. Nothing is lost and a master copy takes two bytes instead of four. The means may be held in bfloat16 too: they are then
rounded up or down by chance, as often as they are near either neighbour, since a mean that moves by less than half a step would otherwise
stand still. Source of the formula: arXiv 1711.05101; of the mixing of bits: Wellons, "lowbias32".
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Numbers at a time: what lies between the operations stays in the cache."""


class AdamwNumbers(NamedTuple):
    """What one step does to a tensor; corrections for means that began at 0 are in `rate` and `root_scale`."""

    scale: float
    """Of the gradient, before anything else."""
    mean_share: float
    """Of the gradient in the mean: 1 - beta1."""
    square_rest: float
    """What stays of the mean square: beta2."""
    rate: float
    root_scale: float
    """Of the root of the mean square."""
    eps: float
    decay: float
    """What the weight loses of itself."""
    step: int
    """Chooses the chances by which bfloat16 means are rounded; the same step rounds the same way."""


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of bfloat16 weights and of what they lack, int16."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def parted(wide: Tensor) -> tuple[Tensor, Tensor]:
    """float32 numbers as bfloat16, to nearest, ties away from 0, and what these lack, int16."""
    bits = wide.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


@torch.no_grad()
def adamw(weight: Tensor, low: Tensor | None, gradient: Tensor, mean: Tensor, square: Tensor, numbers: AdamwNumbers) -> None:
    """Step a float32 weight, or a bfloat16 one with its `low` half, in place; so are both means, float32 or bfloat16.

    The gradient is float32 or bfloat16. All lie in one piece.
    """
    size = _BLOCK if weight.is_cpu else max(1, weight.numel())
    for first in range(0, weight.numel(), size):
        weights, gradients, means, squares = (tensor.view(-1)[first : first + size] for tensor in (weight, gradient, mean, square))
        lows = None if low is None else low.view(-1)[first : first + size]
        _block(weights, lows, gradients, means, squares, numbers, first)


def _block(weight: Tensor, low: Tensor | None, gradient: Tensor, mean: Tensor, square: Tensor, n: AdamwNumbers, first: int) -> None:
    wide = weight if low is None else joined(weight, low)
    g = gradient.float() * n.scale
    new_mean, new_square = mean.float(), square.float()
    new_mean = new_mean + (g - new_mean) * n.mean_share
    new_square = new_square * n.square_rest + g * g * (1.0 - n.square_rest)
    wide = wide - wide * n.decay
    wide = wide - new_mean * n.rate / (new_square.sqrt() * n.root_scale + n.eps)
    if mean.dtype == torch.float32:
        mean.copy_(new_mean)
        square.copy_(new_square)
    else:
        chance = _noise(first, len(weight), n.step, weight.device)
        mean.copy_(_by_chance(new_mean, chance))
        square.copy_(_by_chance(new_square, chance >> 16))
    if low is None:
        weight.copy_(wide)
    else:
        high, rest = parted(wide)
        weight.copy_(high)
        low.copy_(rest)


def _by_chance(wide: Tensor, chance: Tensor) -> Tensor:
    """To bfloat16: up as often as the number is near the upper neighbour. The lower 16 bits of `chance` count."""
    return ((wide.view(torch.int32) + (chance & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)


def _noise(first: int, count: int, step: int, device: torch.device) -> Tensor:
    """32 bits that look random for each place of a tensor, int32; arithmetic of 32 bits wraps around."""
    x = (torch.arange(first, first + count, device=device) * 0x9E3779B1 + step * 0x85EBCA77).to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros for what comes in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
