"""AdamW on one tensor against its formula in float64, and weights in two halves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops.optimise import AdamwNumbers, adamw, joined, parted

NUMBERS = AdamwNumbers(scale=0.3, mean_share=0.1, square_rest=0.95, rate=1e-2 / 0.1, root_scale=0.05**-0.5, eps=1e-8, decay=1e-3, step=1)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(weight, gradient, mean, square, n=NUMBERS):
    weight, g, mean, square = weight.double(), gradient.double() * n.scale, mean.double(), square.double()
    mean, square = mean + (g - mean) * n.mean_share, square * n.square_rest + g**2 * (1 - n.square_rest)
    return weight - weight * n.decay - n.rate * mean / (square.sqrt() * n.root_scale + n.eps), mean, square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_its_formula(dtype):
    weight, gradient = random(300, 301, seed=0), random(300, 301, seed=1).to(dtype)  # more numbers than a block holds
    mean, square = random(300, 301, seed=2), random(300, 301, seed=3).square()
    expected = formula(weight, gradient, mean, square)
    high, low = parted(weight) if dtype == torch.bfloat16 else (weight, None)
    adamw(high, low, gradient, mean, square, NUMBERS)
    found = weight if low is None else joined(high, low)
    for got, want in zip((found, mean, square), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=5e-7, rtol=5e-7)  # float32, a few roundings of numbers up to 4


@given(st.lists(finite, min_size=1, max_size=40))
@settings(deadline=None)
def test_two_halves_hold_the_whole_number(values):
    wide = torch.tensor(values, dtype=torch.float32)
    high, low = parted(wide)
    assert torch.equal(joined(high, low), wide)
    near = wide.bfloat16()
    tie = (wide.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~tie], near[~tie])  # to nearest, but for numbers that lie in the middle


def test_bfloat16_means_are_rounded_by_chance_to_both_neighbours():
    size = 40000
    gradient = torch.full((size,), 1.0 + 2**-9)  # a quarter of the way from 1 to its upper neighbour, 1 + 2^-7
    means = []
    for step in (1, 2):
        mean, square = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
        numbers = NUMBERS._replace(scale=1.0, mean_share=1.0, square_rest=0.0, step=step)
        adamw(torch.zeros(size), None, gradient, mean, square, numbers)
        assert set(mean.tolist()) == {1.0, 1.0 + 2**-7}
        assert (mean > 1).float().mean().item() == pytest.approx(0.25, abs=0.02)  # nine standard deviations
        assert square.float().mean().item() == pytest.approx((1 + 2**-9) ** 2, abs=2e-4)
        agree = ((mean > 1) == (square > 1.005)).float().mean().item()
        assert agree < 0.9  # both means do not follow the same chance
        means.append(mean)
    assert not torch.equal(*means)
    again = torch.zeros(size, dtype=torch.bfloat16)
    adamw(torch.zeros(size), None, gradient, again, square, numbers)
    assert torch.equal(again, means[1])  # the same step rounds the same way
