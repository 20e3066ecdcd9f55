"""SmoothQuant: factors as the paper writes them, a function that stays the same, and rounding that loses less."""

import copy

import numpy as np
import pytest
import torch

from ernie45.nn.attention import PackedCausal
from ernie45.nn.rope import turns
from ernie45.quant import awq, smooth
from ernie45.quant.calibrate import InputStatistics, Pair
from ernie45.quant.methods import METHODS, Streams, _widen, quantise_block
from ernie45.quant.model import quantisable
from ernie45.quant.spec import Scheme


def hidden(decoder, sequences=4, length=24):
    """States with two very large dimensions, as trained models have them from some layer on."""
    x = torch.randn(sequences, length, 64, generator=torch.Generator().manual_seed(3))
    x[..., 5] *= 60
    x[..., 40] *= 30
    return x, turns(torch.arange(length), decoder.frequencies_P)


def through(block, x, turns_LP):
    return torch.stack([block(one, turns_LP, PackedCausal([len(one)])) for one in x])


def test_factors_are_those_of_the_paper_up_to_a_common_one():
    generator = torch.Generator().manual_seed(0)
    largest, weights = torch.rand(20, generator=generator) * 50 + 0.1, torch.rand(20, generator=generator) + 0.01
    for exponent in (0.25, 0.5, 0.9):
        plain = np.power(largest.double().numpy(), exponent) / np.power(weights.double().numpy(), 1 - exponent)
        got = smooth.factors(largest, weights, exponent).double().numpy()
        np.testing.assert_allclose(got / got[0], plain / plain[0], rtol=1e-5)
        assert got.max() * got.min() == pytest.approx(1, rel=1e-5)


def test_the_search_finds_the_exponent_of_least_error_by_plain_sums():
    """Per-token rounding of activations and per-row rounding of weights, written out in float64, for every exponent."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 96, generator=generator), torch.randn(48, 96, generator=generator)
    x[:, 7] *= 80
    found = smooth.search(x.abs().amax(0), x, [awq.Reader(weight, x.t() @ x, Scheme(8, 0))])

    def error(factors):
        a, w = x.double() / factors, weight.double() * factors
        steps = a.abs().amax(1, keepdim=True) / 127, (w.abs().amax(1, keepdim=True) / 127).half().double()
        return float(
            (((a / steps[0]).round() * steps[0]) @ ((w / steps[1]).round() * steps[1]).t() - x.double() @ weight.double().t())
            .square()
            .sum()
        )

    errors = {0.0: error(torch.ones(96).double())}
    for step in range(1, 21):
        errors[step / 20] = error(smooth.factors(x.abs().amax(0), weight.abs().amax(0), step / 20).double())
    assert errors[found.exponent] <= 1.02 * min(errors.values())  # float32 beside float64
    assert found.error == pytest.approx(errors[found.exponent], rel=0.02)
    assert found.plain_error == pytest.approx(errors[0.0], rel=0.02)
    assert found.error < 0.2 * found.plain_error


def test_where_nothing_is_large_nothing_is_lost():
    x, weight = torch.full((32, 64), 1.0), torch.ones(16, 64)
    found = smooth.search(x.abs().amax(0), x, [awq.Reader(weight, x.t() @ x, Scheme(8, 0))])
    assert found.error <= found.plain_error
    assert torch.equal(found.factors_I, torch.ones(64))


@pytest.mark.parametrize("kind", [{}, {"experts": True}, {"bias": True}])
def test_the_function_stays_and_large_inputs_shrink(tiny, kind):
    decoder = tiny(**kind)
    block = decoder.layers[1]
    x, turns_LP = hidden(decoder)
    before = through(block, x, turns_LP)
    names = [name for name, _ in quantisable(block)]
    seen = Pair(block, x, turns_LP).observe(names, least_tokens=0)
    entered = seen["attn.qkv"]
    assert isinstance(entered, InputStatistics)
    exponents = _widen(block, dict.fromkeys(names, Scheme(8, 0)), dict(seen), smooth=True)
    assert exponents["attn.qkv"] > 0
    torch.testing.assert_close(through(block, x, turns_LP), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    after = Pair(block, x, turns_LP).observe(["attn.qkv"], least_tokens=0)["attn.qkv"]
    assert isinstance(after, InputStatistics)
    assert after.largest_I.max() / after.largest_I.median() < 0.5 * entered.largest_I.max() / entered.largest_I.median()


@pytest.mark.parametrize("experts", [False, True])
def test_eight_bits_lose_less(tiny, experts):
    lost = {}
    for method in ("rtn", "smooth"):
        decoder = tiny(experts=experts)
        block = copy.deepcopy(decoder.layers[1])
        x, turns_LP = hidden(decoder)
        want = through(block, x, turns_LP) - x
        schemes = {f"layers.1.{name}": Scheme(8, 0) for name, _ in quantisable(block)}
        packed, _ = quantise_block(block, "layers.1", schemes, METHODS[method], Streams(x, x.clone(), turns_LP, 4))
        lost[method] = float((through(packed, x, turns_LP) - x - want).norm() / want.norm())
    assert 0 < lost["smooth"] < 0.7 * lost["rtn"]
