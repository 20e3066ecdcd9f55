"""Rounding to nearest: errors bounded by what a step allows, clipping that never loses, input that is refused."""

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.ops.quantised import dequantise
from ernie45.quant.rtn import round_to_nearest
from ernie45.quant.spec import Scheme


def _error(weight, scheme):
    return (
        dequantise(round_to_nearest(weight, scheme))[:, : weight.shape[1]] - weight.float()
    ).square().mean().sqrt() / weight.float().std()


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_eight_bits_stay_within_half_a_step(group):
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    back = dequantise(round_to_nearest(weight, Scheme(8, group)))[:, :200]
    # half a step of 1/127 of the largest weight, and the scale itself is rounded by 2 ** -11 of the value
    assert (back - weight).abs().max() <= weight.abs().max() * (0.5 / 127 + 2**-11) * 1.001


def test_fewer_bits_and_wider_groups_lose_more():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [_error(weight, Scheme(bits, group)) for bits, group in ((8, 32), (8, 0), (4, 32), (4, 64), (4, 128), (4, 0))]
    assert errors == sorted(errors)
    assert 0.06 < errors[2] < 0.09  # normal weights, groups of 32, 16 levels


def test_the_search_loses_less_than_plain_rounding():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-7, 7) * scale - groups).square().mean().sqrt() / weight.std()
    assert _error(weight, Scheme(4, 64)) < 0.93 * plain


def test_zeros_and_tiny_weights():
    weight = torch.zeros(16, 64)
    assert not dequantise(round_to_nearest(weight, Scheme(4, 32))).any()
    weight[3] = 1e-12  # below float16: becomes zero, not infinite
    assert dequantise(round_to_nearest(weight, Scheme(4, 32))).isfinite().all()


def test_damaged_weights_are_refused():
    weight = torch.zeros(16, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        round_to_nearest(weight, Scheme(4, 32))
