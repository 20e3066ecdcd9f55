"""Products that learn in FP8 against a float64 twin that rounds by the written definition, and against what rounding may cost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops.fp8 import E4M3_MAX
from ernie45.ops.fp8_training import fp8_trained_linear
from tests.ops.test_fp8 import NUMBERS, random

TILE = 128


def nearest(values):
    """Each value as the nearest E4M3 number, ties to the even code, in float64."""
    size = np.minimum(np.abs(values), E4M3_MAX)
    above = np.searchsorted(NUMBERS, size).clip(1, len(NUMBERS) - 1)
    low, high = NUMBERS[above - 1], NUMBERS[above]
    down = (size - low < high - size) | ((size - low == high - size) & (above % 2 == 1))
    return np.copysign(np.where(down, low, high), values)


def rounded(matrix, rows, columns):
    """What a matrix stands for after rounding by blocks of `rows` x `columns`, in float64. Scales and quotients are float32, as stored."""
    made = np.zeros(matrix.shape)
    for r in range(0, matrix.shape[0], rows):
        for c in range(0, matrix.shape[1], columns):
            part = matrix[r : r + rows, c : c + columns].astype(np.float32)
            scale = max(np.float32(np.abs(part).max() / np.float32(E4M3_MAX)), np.float32(1e-30))
            made[r : r + rows, c : c + columns] = nearest((part / scale).astype(np.float64)) * np.float64(scale)
    return made


def twin(x, weight, pull):
    """Output and both gradients by the definition: every operand in tiles along the inputs of its product."""
    x8, w8 = rounded(x, 1, TILE), rounded(weight, TILE, TILE)
    into_weight = rounded(pull.T, 1, TILE) @ rounded(x8.T.astype(np.float32), 1, TILE).T
    return x8 @ w8.T, rounded(pull, 1, TILE) @ w8, into_weight


def learned(x, weight, pull):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_trained_linear(x, weight)
    out.backward(pull)
    return out.detach(), x.grad, weight.grad


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 150), inner=st.integers(1, 200), outer=st.integers(1, 150), seed=st.integers(0, 99))
def test_all_three_products_are_the_float64_twins(tokens, inner, outer, seed):
    # rows of very different size, so that a scale of the wrong tile shows
    x = random(tokens, inner, seed=seed) * 10.0 ** random(tokens, 1, seed=seed + 1)
    weight, pull = (
        random(outer, inner, seed=seed + 2) * 0.05,
        random(tokens, outer, seed=seed + 3) * 10.0 ** random(1, outer, seed=seed + 4),
    )
    found = learned(x, weight, pull)
    for got, want in zip(found, twin(x.numpy(), weight.numpy(), pull.numpy()), strict=True):
        # sums in float32: a few units of the last place of the largest
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-4, atol=1e-5 * float(np.abs(want).max()))


def test_gradients_are_as_near_as_four_digits_allow():
    """A rounded number is off by a sixteenth of itself or by half the smallest step; a product by the sums of both."""
    x, weight, pull = random(200, 300), random(180, 300, seed=1) * 0.05, random(200, 180, seed=2)
    out, into_x, into_weight = learned(x, weight, pull)
    share = (1 + 2**-4) ** 2 - 1
    again = (1 + 2**-4) ** 3 - 1  # x was rounded twice
    for got, left, right, bound in ((out, x, weight.t(), share), (into_x, pull, weight, share), (into_weight, pull.t(), x, again)):
        exact = left.double() @ right.double()
        limit = bound * (left.abs().double() @ right.abs().double())
        assert bool(((got.double() - exact).abs() <= limit * 1.01).all())
        off = float((got.double() - exact).norm() / exact.norm())
        assert 0.01 < off < 0.06  # 2.6 % for each operand, by chance up and down


def test_types_and_what_is_not_asked_for():
    x, weight = random(5, 40).bfloat16().requires_grad_(), random(7, 40, seed=1).bfloat16()
    out = fp8_trained_linear(x, weight)
    assert out.dtype == torch.bfloat16
    held = [tensor for tensor in out.grad_fn.saved_tensors if tensor.dtype == torch.float8_e4m3fn]
    assert [tensor.shape for tensor in held] == [x.shape]  # a byte a number
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad is None


@pytest.mark.parametrize("place", ["x", "weight", "pull"])
def test_a_number_that_is_none_reaches_the_gradient(place):
    given_ = {"x": random(4, 30), "weight": random(6, 30, seed=1), "pull": random(4, 6, seed=2)}
    given_[place][1, 2] = float("inf")
    found = learned(**given_)
    assert any(not bool(tensor.isfinite().all()) for tensor in found)
