"""AWQ: widen the inputs that carry most before rounding, and narrow whatever feeds them by as much, so that the function stays the same.

Input j of a matrix is multiplied by s_j in the weights and divided by it where it comes from: in the norm before (q|k|v, gate|up and the
router), in the up half of gate|up (down), or in the value rows (out; heads that share a value head share its s). s_j = m_j^a with m the
mean magnitude of the input and a from a grid; a = 0 changes nothing and is among the candidates (Lin et al. 2023, arXiv 2306.00978).
The error is that of the outputs, taken from the Gram matrix of the inputs, so no inputs are kept.

Letters: O and I out- and input widths, F feed-forward width, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.quant.gptq import round_to_nearest
from ernie45.quant.hadamard import turned, turned_gram
from ernie45.quant.spec import Scheme

_STEPS = 20


class Widening(NamedTuple):
    """Factors s [I], the exponent they came from, and the error with them and without."""

    factors_I: Tensor
    exponent: float
    error: float
    plain_error: float


class Reader(NamedTuple):
    """A matrix [O, I] that reads the inputs, and how it will be rounded."""

    weight_OI: Tensor
    gram_II: Tensor
    scheme: Scheme


def factors(magnitude_I: Tensor, exponent: float) -> Tensor:
    """m^a, scaled so that the largest and the smallest are each other's inverse: a common factor changes no rounding."""
    powered_I = magnitude_I.clamp(min=1e-8).pow(exponent)
    return (powered_I / (powered_I.max() * powered_I.min()).sqrt()).clamp(1e-4, 1e4)


def search(magnitude_I: Tensor, readers: Sequence[Reader], steps: int = _STEPS) -> Widening:
    """The exponent with the least error over all matrices that read the same inputs, each rounded to nearest."""
    best, plain = Widening(torch.ones_like(magnitude_I), 0.0, float("inf"), float("inf")), float("inf")
    for step in range(steps):
        exponent = step / steps
        factors_I = factors(magnitude_I, exponent) if step else torch.ones_like(magnitude_I)
        error = sum(widened_error(reader, factors_I) for reader in readers)
        plain = plain if step else error
        if error < best.error:
            best = Widening(factors_I, exponent, error, plain)
    return best._replace(plain_error=plain)


def widened_error(reader: Reader, factors_I: Tensor) -> float:
    """Output error of rounding W s to nearest and reading it with x / s."""
    scheme = reader.scheme
    wide_OI, gram_II = turned(reader.weight_OI * factors_I, scheme), turned_gram(narrowed_gram(reader.gram_II, factors_I), scheme)
    return round_to_nearest(wide_OI, gram_II, scheme.weight_bits, scheme.group).error


def narrowed_gram(gram_II: Tensor, factors_I: Tensor) -> Tensor:
    """The Gram matrix of x / s."""
    return gram_II / torch.outer(factors_I, factors_I)


def shared_by_head(magnitude_I: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Magnitudes of the attention output [N * H], heads of one key head given their common mean: one value row feeds them all."""
    grouped = magnitude_I.view(num_kv_heads, num_heads // num_kv_heads, -1)
    return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold_into_values(qkv_weight: Tensor, qkv_bias: Tensor | None, factors_I: Tensor, num_heads: int, num_kv_heads: int) -> None:
    """Divide the value rows, in place, by the factors of the attention output (equal over the heads of a key head)."""
    rows = factors_I.view(num_kv_heads, num_heads // num_kv_heads, -1)[:, 0].reshape(-1)
    qkv_weight[-len(rows) :] /= rows[:, None]
    if qkv_bias is not None:
        qkv_bias[-len(rows) :] /= rows


@torch.no_grad()
def fold_into_up(gate_up_weight: Tensor, gate_up_bias: Tensor | None, factors_F: Tensor) -> None:
    """Divide the up rows of gate|up, in place: silu(gate) * (up / s) is the inner value over s. Works on one matrix or stacked experts."""
    gate_up_weight[..., -len(factors_F) :, :] /= factors_F[:, None]
    if gate_up_bias is not None:
        gate_up_bias[-len(factors_F) :] /= factors_F
