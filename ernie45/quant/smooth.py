"""SmoothQuant: move the digits that single large activations take into the weights, for schemes that round both.

Input j is divided by s_j where it comes from and multiplied by it in the weights, as AWQ does (`quant/awq.py` folds for both), with
s_j = max|x_j|^a / max|w_j|^(1 - a) (Xiao et al. 2022, arXiv 2211.10438, equation 4). The exponent a is searched: rounded activations times
rounded weights are compared with the float product on inputs that were kept from the calibration text, and nothing at all is a candidate.

Letters: O and I out- and input widths, S kept inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.ops import PackedWeight
from ernie45.quant import awq
from ernie45.quant.rtn import round_to_nearest

_STEPS = 20
_SMALLEST = 1e-5  # of a magnitude: what never occurred must not get an endless factor


def factors(largest_I: Tensor, weight_largest_I: Tensor, exponent: float) -> Tensor:
    """max|x|^a / max|w|^(1 - a), scaled so that the largest and the smallest are each other's inverse: a common factor changes nothing."""
    raised_I = largest_I.clamp(min=_SMALLEST).pow(exponent) / weight_largest_I.clamp(min=_SMALLEST).pow(1 - exponent)
    return (raised_I / (raised_I.max() * raised_I.min()).sqrt()).clamp(1e-4, 1e4)


def search(
    largest_I: Tensor, inputs_SI: Tensor, readers: Sequence[awq.Reader], shared: Callable[[Tensor], Tensor] = lambda x_I: x_I
) -> awq.Widening:
    """The exponent with the least error over all matrices that read the same inputs; 0 and factors of one where none helps.

    `shared` makes magnitudes equal where one row feeds several inputs (attention's value rows).
    """
    weight_largest_I = shared(torch.stack([reader.weight_OI.abs().amax(0) for reader in readers]).amax(0))
    ones_I = torch.ones_like(largest_I)
    plain = sum(rounded_error(reader, inputs_SI, ones_I) for reader in readers)
    best = awq.Widening(ones_I, 0.0, plain, plain)
    for step in range(1, _STEPS + 1):
        factors_I = factors(shared(largest_I), weight_largest_I, step / _STEPS)
        error = sum(rounded_error(reader, inputs_SI, factors_I) for reader in readers)
        if error < best.error:
            best = awq.Widening(factors_I, step / _STEPS, error, plain)
    return best


def rounded_error(reader: awq.Reader, inputs_SI: Tensor, factors_I: Tensor) -> float:
    """Energy that the outputs lose when W s is rounded and reads x / s, rounded as the scheme says."""
    packed = round_to_nearest(reader.weight_OI * factors_I, reader.scheme)
    assert isinstance(packed, PackedWeight), "whoever searches leaves out codes, which are not rounded number by number"
    lost_SO = ops.packed_linear(inputs_SI / factors_I, packed) - inputs_SI @ reader.weight_OI.t()
    return float(lost_SO.square().sum(dtype=torch.float64))
