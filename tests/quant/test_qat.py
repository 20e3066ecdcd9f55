"""Learning through the rounding: what is packed is what was trained, gradients are LSQ's, and less is lost than by rounding afterwards."""

import pytest
import torch

from ernie45.models.load import load
from ernie45.models.released import tiny
from ernie45.models.save import save_packed
from ernie45.models.text import Decoder
from ernie45.nn.layers import Linear
from ernie45.ops import PackedWeight, dequantise
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from ernie45.quant.model import quantise_model
from ernie45.quant.pack import unpacked
from ernie45.quant.qat import QatEmbedding, QatExperts, QatLinear, _Rounded, pack_trained, prepare_training
from ernie45.quant.spec import QuantSpec, Scheme
from ernie45.train.optim import Optimiser, OptimiserConfig, decays, is_hidden_matrix
from ernie45.train.step import LossConfig, Step
from tests.quant.conftest import taught
from tests.train.conftest import make_batch

TOKENS = [5, 9, 77, 300, 12, 8, 41]
SCHEMES = ["w4a8-g64-h", "w4a8-g32", "w8a8", "w4a16-g64"]


def make_decoder(**how):
    return Decoder(tiny(**how)).initialise(torch.Generator().manual_seed(0), std=0.1)


def trained(scheme, steps=4, **how):
    """A tiny model after some steps through the rounding; scales have moved, so that their float16 matters."""
    decoder, spec = make_decoder(**how), QuantSpec.uniform(scheme)
    prepare_training(decoder, spec)
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 16), LossConfig())
    losses = [step([make_batch()], n, 3e-3).loss for n in range(steps)]
    return decoder, spec, losses


def watched(decoder, kinds):
    """Name -> (arguments, result) of the last call of every module of these kinds, filled in as they are called."""
    seen = {}
    for name, module in decoder.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _, given, told, name=name: seen.update({name: (given, told.detach())}))
    return seen


@pytest.mark.parametrize("scheme", SCHEMES)
def test_at_the_start_it_is_round_to_nearest(scheme):
    rounded, prepared = make_decoder(), make_decoder()
    quantise_model(rounded, QuantSpec.uniform(scheme))
    prepare_training(prepared, QuantSpec.uniform(scheme))
    pack_trained(prepared)
    expected, found = rounded.state_dict(), prepared.state_dict()
    assert set(found) == set(expected)
    # a scale passes a logarithm: one in a few thousand lands on the neighbouring float16
    differ = sum((found[name].float() != expected[name].float()).sum().item() for name in found if name.endswith("_scale"))
    assert differ <= sum(value.numel() for name, value in expected.items() if name.endswith("_scale")) // 50


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_packed_folder_computes_what_was_trained(tmp_path, scheme, experts):
    decoder, spec, losses = trained(scheme, experts=experts)
    assert losses[-1] < losses[0] - 0.1
    decoder.eval()
    kinds = [QatLinear, QatEmbedding, *([QatExperts] if experts else [])]
    assert all(any(isinstance(module, kind) for module in decoder.modules()) for kind in kinds)
    matrices = {name: m for name, m in decoder.named_modules() if isinstance(m, QatLinear)}
    wanted = {name: (m.matrix.rounded(m.weight, m.scales()).detach(), m.scales().detach()) for name, m in matrices.items()}
    seen = watched(decoder, tuple(kinds))
    logits = decoder.prompt_logits(TOKENS)
    pack_trained(decoder)
    save_packed(decoder, tmp_path / "packed", spec, made_by="test")
    loaded = load(tmp_path / "packed")
    assert loaded.opened.spec == spec
    for name, (rounded_OW, scales_OG) in wanted.items():
        weight = loaded.decoder.get_submodule(name).weight
        assert isinstance(weight, PackedWeight)
        _, scales = unpacked(weight._replace(hadamard=False), rounded_OW.shape[1])
        assert torch.equal(scales, scales_OG)  # to the bit: nothing is rounded again
        assert torch.equal(dequantise(weight._replace(hadamard=False))[:, : rounded_OW.shape[1]], rounded_OW)
    assert len(seen) == sum(isinstance(module, (QuantLinear, QuantEmbedding, QuantExperts)) for module in loaded.decoder.modules())
    with torch.no_grad():
        for name, (given, told) in seen.items():  # module by module, on what reached it in training: nothing adds up on the way
            torch.testing.assert_close(
                loaded.decoder.get_submodule(name)(*given), told, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    if "a16" in scheme:  # rounded activations would amplify the order of sums: one on the edge of two whole numbers moves by a step
        assert (loaded.decoder.prompt_logits(TOKENS) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_what_it_packs(scheme):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(100, 48)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    through, x_TI = QatLinear(layer, Scheme.parse(scheme)), torch.randn(40, 100, generator=generator)
    with torch.no_grad():
        # sums are exact there and float32 here: outputs around 10
        torch.testing.assert_close(through.packed()(x_TI), through(x_TI), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_the_written_formula(bits):
    """In float64 by autograd, with round as x + (round(x) - x) without gradient: LSQ as it is written."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 50, generator=generator).requires_grad_()
    low, high = -(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1
    scales = (torch.rand(6, 2, generator=generator) * 2 / high + 0.5 / high).to(torch.float16).float().requires_grad_()
    pull = torch.randn(6, 50, generator=generator)
    _Rounded.apply(weight, scales, bits, 32).backward(pull)
    w = weight.detach().double().requires_grad_()
    s = scales.detach().double().requires_grad_()
    wide = s.repeat_interleave(32, 1)[:, :50]
    inside = (w / wide).clamp(low, high)
    expected = (inside + (inside.round() - inside).detach()) * wide
    expected.backward(pull.double())
    assert (inside == low).any()  # some weights are cut off
    torch.testing.assert_close(scales.grad.double(), s.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w.grad, atol=1e-6, rtol=1e-6)


def test_scales_neither_decay_nor_are_orthogonalised():
    decoder, *_ = trained("w4a8-g32", steps=1, experts=True)
    scales = {name: p for name, p in decoder.named_parameters() if name.endswith("log_scale")}
    assert scales
    assert not any(decays(name, p) or is_hidden_matrix(name, p) for name, p in scales.items())
    assert decays("embed.latent", decoder.embed.latent)
    assert not is_hidden_matrix("embed.latent", decoder.embed.latent)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8-g32-h"])
def test_it_loses_less_than_rounding_to_nearest(scheme):
    """A matrix that is to go on giving its outputs for inputs that hang together, as hidden states do."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(64, 48)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    x_TI = torch.randn(400, 12, generator=generator) @ torch.randn(12, 64, generator=generator)
    wanted_TO = layer(x_TI).detach()
    nearest, packed = taught(QatLinear(layer, Scheme.parse(scheme)), x_TI, wanted_TO, rate=3e-3, close=1e-3)
    assert packed < 0.6 * nearest
