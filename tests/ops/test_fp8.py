"""FP8 numbers against their definition, written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.ops.fp8 import E4M3_MAX, INPUT_BLOCK, ROW, WEIGHT_BLOCK, WHOLE, Block, fp8_inputs, fp8_linear, from_fp8, to_fp8, with_scale

# All numbers from zero up, by the OCP specification: 4 bits of exponent with bias 7, 3 of mantissa, code 127 is NaN.
NUMBERS = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


def nearest(value: float) -> float:
    """The E4M3 number nearest to a value, ties to the even code; beyond the largest, the largest."""
    size = min(abs(float(value)), E4M3_MAX)
    code = int(np.searchsorted(NUMBERS, size))
    if code and (size - NUMBERS[code - 1] < NUMBERS[code] - size or (size - NUMBERS[code - 1] == NUMBERS[code] - size and code % 2)):
        code -= 1
    return float(np.copysign(NUMBERS[code], value))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_table_is_the_types():
    assert np.array_equal(NUMBERS, torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy())


@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20))
def test_rounding_is_to_the_nearest_number(values):
    midpoints = ((NUMBERS[:-1] + NUMBERS[1:]) / 2).tolist()  # exact in float32
    values = [*values, *midpoints[:: max(1, len(values))], 448.0, 449.0, -1e30, 2.0**-10, 2.0**-11, 0.0]
    got = with_scale(torch.tensor([values]), torch.ones(1, 1)).double()[0]
    assert got.tolist() == [nearest(value) for value in torch.tensor(values).tolist()]


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block=st.sampled_from([Block(16, 32), Block(1, 16), ROW, WHOLE]),
    seed=st.integers(0, 9),
)
def test_blocks_have_scales_of_their_own_up_to_the_edges(rows, columns, block, seed):
    matrix = random(rows, columns, seed=seed) * 10.0 ** random(rows, 1, seed=seed + 1)
    made = to_fp8(matrix, block)
    down, across = block.rows or rows, block.columns or columns
    assert made.scales.shape == (-(-rows // down), -(-columns // across))
    back = from_fp8(made)
    for b in range(made.scales.shape[0]):
        for d in range(made.scales.shape[1]):
            part = (slice(b * down, (b + 1) * down), slice(d * across, (d + 1) * across))
            scale = float(made.scales[b, d])
            assert scale == pytest.approx(float(matrix[part].abs().max()) / E4M3_MAX, rel=1e-6)
            # half of the last of 4 digits, or of the smallest step
            bound = torch.maximum(matrix[part].abs() * 2.0**-4, torch.tensor(scale * 2.0**-10)) * 1.0001
            assert bool(((back[part] - matrix[part]).abs() <= bound).all())


@pytest.mark.parametrize(("inputs", "weights"), [(INPUT_BLOCK, WEIGHT_BLOCK), (ROW, ROW), (ROW, WHOLE)])
def test_products_equal_their_float64_twin(inputs, weights):
    x, weight = random(5, 200), random(150, 200, seed=1)
    a, b = fp8_inputs(x, inputs), to_fp8(weight, weights)
    twin = from_fp8(a).double() @ from_fp8(b).double().t()
    torch.testing.assert_close(fp8_linear(a, b).double(), twin, rtol=1e-6, atol=2e-5)  # float32 sums of 200 terms about 1
    assert (twin - x.double() @ weight.double().t()).norm() / twin.norm() < 0.05  # two roundings of at most 1/16, most far smaller


def test_a_static_scale_is_kept_and_cut_off_at():
    made = fp8_inputs(torch.tensor([[1.0, -3.0, 1000.0]]), INPUT_BLOCK, torch.tensor([0.5]))
    assert from_fp8(made).tolist() == [[1.0, -3.0, 224.0]]


def test_what_is_no_number_shows_in_its_block_alone():
    matrix = random(4, 8)
    matrix[1, 1] = float("nan")
    matrix[2, 7] = float("inf")
    back = from_fp8(to_fp8(matrix, Block(2, 4)))
    assert back[:2, :4].isnan().all()
    assert back[2:, 4:].isnan().all()
    assert back[:2, 4:].isfinite().all()
    assert back[2:, :4].isfinite().all()


def test_zeros_and_nothing():
    assert not from_fp8(to_fp8(torch.zeros(3, 5), WEIGHT_BLOCK)).any()
    assert fp8_linear(fp8_inputs(torch.zeros(0, 8), ROW), to_fp8(torch.ones(4, 8), ROW)).shape == (0, 4)
