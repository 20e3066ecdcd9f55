"""A block quantised by each method: what is seen, what is widened, what the packed block computes."""

import copy

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError
from ernie45.nn.attention import PackedCausal
from ernie45.nn.rope import turns
from ernie45.quant import awq
from ernie45.quant.calibrate import ExpertStatistics, InputStatistics, Pair, original_inputs, token_weights
from ernie45.quant.gptq import GptqSettings, corrected
from ernie45.quant.linear import QuantLinear
from ernie45.quant.methods import METHODS, Streams, _widen, method_named, quantise_block
from ernie45.quant.model import quantisable
from ernie45.quant.spec import Scheme


def stream(decoder, sequences: int = 4, length: int = 24, seed: int = 3):
    """Hidden states with a few strong dimensions, as trained models have them, and the turns."""
    x = torch.randn(sequences, length, 64, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 12
    return x, turns(torch.arange(length), decoder.frequencies_P)


def through(block, x, turns_LP):
    return torch.stack([block(one, turns_LP, PackedCausal([len(one)])) for one in x])


def schemes_of(block, word: str = "w4a8-g32"):
    return {f"layers.1.{name}": Scheme.parse(word) for name, _ in quantisable(block)}


@pytest.mark.parametrize("experts", [False, True])
def test_what_matrices_see_is_what_enters_them(tiny, experts: bool) -> None:
    decoder = tiny(experts)
    block = decoder.layers[1]
    x, turns_LP = stream(decoder)
    names = [name for name, _ in quantisable(block)]
    seen = Pair(block, x, turns_LP).observe(names, least_tokens=0)
    flat = torch.cat([block.attn_norm(one) for one in x]).double()
    found = seen["attn.qkv"]
    assert isinstance(found, InputStatistics)
    torch.testing.assert_close(found.gram_II.double(), flat.t() @ flat, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross_II, found.gram_II)
    torch.testing.assert_close(found.mean_magnitude().double(), flat.abs().mean(0), rtol=1e-4, atol=1e-5)
    assert found.tokens == 96
    if experts:
        routed = seen["ffn.experts"]
        assert isinstance(routed, ExpertStatistics)
        assert sum(routed.routed) == 96 * 2  # every token reaches two experts
        total = sum(one.gram_II.trace() for one in routed.gate_up)
        assert float(total) == pytest.approx(2 * float(routed.everything.gram_II.trace()), rel=1e-4)


def test_tokens_count_by_their_weights(tiny) -> None:
    decoder = tiny()
    block = decoder.layers[1]
    x, turns_LP = stream(decoder)
    weights = token_weights(through(block, x, turns_LP))
    assert float(weights.mean()) == pytest.approx(1)
    energy = through(block, x, turns_LP).square().mean(-1)
    torch.testing.assert_close(weights * energy, (weights * energy)[0, 0].expand(4, 24))
    other = x * 1.1
    originals = original_inputs(block, ["attn.qkv"], other, turns_LP)
    found = Pair(block, x, turns_LP, originals, weights).observe(["attn.qkv"], least_tokens=0)["attn.qkv"]
    assert isinstance(found, InputStatistics)
    now, before = (torch.cat([block.attn_norm(one) for one in entered]).double() for entered in (x, other))
    torch.testing.assert_close(found.gram_II.double(), now.t() @ (now * weights.flatten()[:, None]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross_II.double(), before.t() @ (now * weights.flatten()[:, None]), rtol=1e-4, atol=1e-3)
    assert found.tokens == 96, "tokens are counted, not weighed"


def test_starved_experts_are_calibrated_on_all_tokens(tiny) -> None:
    decoder = tiny(experts=True)
    block = decoder.layers[1]
    block.ffn.router.selection_bias[0] = -10  # never chosen
    x, turns_LP = stream(decoder)
    pair = Pair(block, x, turns_LP)
    some = pair.observe(["ffn.experts"], least_tokens=1)["ffn.experts"]
    assert some.routed[0] == 0
    assert some.starved() == (0,)
    assert some.down[0].tokens == 96
    assert some.gate_up[0] is some.everything
    assert all(some.down[e].tokens == some.routed[e] for e in range(1, 6))
    every = pair.observe(["ffn.experts"], least_tokens=10_000)["ffn.experts"]
    assert every.starved() == tuple(range(6))
    assert all(found.tokens == 96 for found in every.down)


@pytest.mark.parametrize(("experts", "bias"), [(False, False), (False, True), (True, False)])
def test_widening_does_not_change_the_function(tiny, experts: bool, bias: bool) -> None:
    decoder = tiny(experts, bias)
    block = decoder.layers[1]
    x, turns_LP = stream(decoder)
    before = through(block, x, turns_LP)
    names = [name for name, _ in quantisable(block)]
    weights = {name: value.clone() for name, value in block.state_dict().items()}
    seen = Pair(block, x, turns_LP).observe(names, least_tokens=0)
    exponents = _widen(block, {name: Scheme(4, 32) for name in names}, seen)
    assert set(exponents) >= {"attn.qkv"}  # the strong dimension is worth widening
    assert not torch.equal(block.attn_norm.weight, weights["attn_norm.weight"])
    torch.testing.assert_close(through(block, x, turns_LP), before, rtol=1e-4, atol=1e-4)


def test_widening_is_no_worse_than_leaving_it_and_the_twin_agrees() -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 64, generator=random)
    inputs[:, 3] *= 20
    weight = torch.randn(32, 64, generator=random)
    gram = inputs.t() @ inputs
    found = awq.search(inputs.abs().mean(0), [awq.Reader(weight, gram, Scheme(4, 32))])
    assert found.error < found.plain_error * 0.9
    # the same error in float64, from the inputs themselves
    wide = weight * found.factors_I
    from ernie45.quant.gptq import Rounded, restored, to_nearest, weighted_scales

    scales = weighted_scales(wide, gram.diagonal() / found.factors_I**2, 4, 32)
    rounded = restored(Rounded(to_nearest(wide, scales, 4, 32), scales, 0.0), 32).double()
    out = (inputs.double() / found.factors_I.double()) @ rounded.t()
    assert found.error == pytest.approx(float((out - inputs.double() @ weight.double().t()).square().sum()), rel=1e-3)


def test_correction_is_least_squares() -> None:
    random = torch.Generator().manual_seed(1)
    original = torch.randn(500, 48, generator=random)
    now = original + 0.3 * torch.randn(500, 48, generator=random) @ torch.randn(48, 48, generator=random) / 7
    weight = torch.randn(20, 48, generator=random)
    found = corrected(weight, now.t() @ now, original.t() @ now, GptqSettings(damping=1e-9))
    best = torch.linalg.lstsq(now.double(), original.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)
    kept = corrected(weight, now.t() @ now, now.t() @ now, GptqSettings())
    torch.testing.assert_close(kept, weight)


@pytest.mark.parametrize("experts", [False, True])
def test_each_method_is_better_than_the_one_before_on_fresh_input(tiny, experts: bool) -> None:
    decoder = tiny(experts)
    x, turns_LP = stream(decoder, sequences=24)
    fresh, _ = stream(decoder, seed=8)
    wanted = through(decoder.layers[1], fresh, turns_LP)
    lost = {}
    for name, method in METHODS.items():
        block = copy.deepcopy(decoder.layers[1])
        streams = Streams(x, x, turns_LP, least_tokens=8) if method.needs_text else None
        schemes = schemes_of(block)
        packed, reports = quantise_block(block, "layers.1", schemes, method, streams)
        assert {report.name for report in reports} == set(schemes)
        lost[name] = float((through(packed, fresh, turns_LP) - wanted).square().sum())
    assert lost["gptq"] < 0.8 * lost["rtn"]
    assert lost["awq"] < lost["rtn"]
    assert lost["awq+gptq"] < lost["awq"]


def test_modules_without_a_scheme_stay_whole(tiny) -> None:
    decoder = tiny()
    block = decoder.layers[1]
    x, turns_LP = stream(decoder)
    schemes = schemes_of(block) | {"layers.1.ffn.down": None}
    packed, reports = quantise_block(block, "layers.1", schemes, METHODS["awq+gptq"], Streams(x, x, turns_LP, 0))
    assert {report.name for report in reports} == {"layers.1.attn.qkv", "layers.1.attn.out", "layers.1.ffn.gate_up"}
    assert not isinstance(packed.ffn.down, QuantLinear)
    assert isinstance(packed.ffn.gate_up, QuantLinear)


def test_activations_that_are_no_numbers_are_refused(tiny) -> None:
    decoder = tiny()
    block = decoder.layers[1]
    x, turns_LP = stream(decoder)
    x[1, 3, 7] = float("nan")
    with pytest.raises(CheckpointError, match=r"attn.qkv.*NaN"):
        quantise_block(block, "layers.1", schemes_of(block), METHODS["gptq"], Streams(x, x, turns_LP, 0))


def test_an_unknown_method_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gptq'"):
        method_named("gtpq")
