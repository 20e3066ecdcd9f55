"""Learning through FP8 rounding: what is packed is what was trained, scales are found as written, less is lost than by rounding."""

import pytest
import torch

from ernie45.errors import ConfigError
from ernie45.models.load import load
from ernie45.models.save import save_packed
from ernie45.nn.layers import Linear
from ernie45.ops.fp8 import E4M3_MAX
from ernie45.ops.quantised import hadamard
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear
from ernie45.quant.fp8_qat import InputScale, QatFp8Experts, QatFp8Linear
from ernie45.quant.model import quantise_model
from ernie45.quant.qat import pack_trained, prepare_training
from ernie45.quant.spec import Fp8Scheme, QuantSpec, Rule
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.ops.test_fp8 import random
from tests.ops.test_fp8_training import rounded
from tests.quant.conftest import taught
from tests.train.conftest import make_batch, make_decoder

IDS = [5, 9, 77, 300, 12, 8, 41]
WORDS = ["fp8-tensor-static-h", "fp8-channel-h", "fp8-block"]


def spec_of(word):
    return QuantSpec(rules=(Rule(pattern="embed", scheme=None), Rule(pattern="*", scheme=word)))


def trained(word, experts=False, steps=4, online=2):
    decoder = make_decoder(experts=experts)
    prepare_training(decoder, spec_of(word), online=online)
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 16), LossConfig())
    return decoder, [step([make_batch()], n, 3e-3).loss for n in range(steps)]


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_the_packed_folder_computes_what_was_trained(tmp_path, word, experts):
    decoder, losses = trained(word, experts)
    assert losses[-1] < losses[0] - 0.1
    decoder.eval()
    matrices = {name: module for name, module in decoder.named_modules() if isinstance(module, QatFp8Linear)}
    wanted = {name: module.matrix.packed(module.weight) for name, module in matrices.items()}
    logits = decoder.prompt_logits(IDS)
    assert any(isinstance(module, QatFp8Experts) for module in decoder.modules()) == experts
    pack_trained(decoder)
    save_packed(decoder, tmp_path / "packed", spec_of(word), made_by="test")
    loaded = load(tmp_path / "packed")
    assert loaded.opened.spec == spec_of(word)
    assert any(isinstance(module, Fp8Experts) for module in loaded.decoder.modules()) == experts
    for name, weight in wanted.items():  # to the bit: nothing is rounded again
        found = loaded.decoder.get_submodule(name)
        assert isinstance(found, Fp8Linear)
        assert torch.equal(found.weight_fp8.view(torch.uint8), weight.matrix.values.view(torch.uint8))
        assert torch.equal(found.weight_fp8_scale, weight.matrix.scales)
        assert (found.input_fp8_scale is None) == (weight.input_scale is None)
        assert weight.input_scale is None or torch.equal(found.input_fp8_scale, weight.input_scale)
    torch.testing.assert_close(loaded.decoder.prompt_logits(IDS), logits, atol=1e-5, rtol=1e-5)


def test_without_training_it_is_round_to_nearest():
    once, through = make_decoder(experts=True), make_decoder(experts=True)
    quantise_model(once, spec_of("fp8-channel-h"))
    prepare_training(through, spec_of("fp8-channel-h"))
    pack_trained(through)
    expected, found = once.state_dict(), through.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_a_layer_is_the_written_formula():
    """Turned by Hadamard matrices of 32, one scale for weights, one found for inputs; gradients stop where inputs are cut off."""
    layer, x = Linear(64, 24), random(10, 64, seed=1)
    with torch.no_grad():
        layer.weight.copy_(random(24, 64) * 0.1)
    through = QatFp8Linear(layer, Fp8Scheme("tensor", True, True), online=0)
    turn = torch.block_diag(hadamard(32), hadamard(32)).double()
    turned = x.double() @ turn
    scale = float(turned.abs().max()) / E4M3_MAX / 2  # the largest are beyond it
    through.matrix.static.input_scale.fill_(scale)
    inputs = x.clone().requires_grad_()
    out = through(inputs)
    exact = out.detach().double()
    cut = turned.clamp(-448 * scale, 448 * scale)
    weight = torch.from_numpy(rounded((layer.weight.detach().double() @ turn).numpy(), 24, 64))
    written = cut @ weight.t()
    assert float((exact - written).norm() / written.norm()) < 0.04  # the inputs' own rounding: 2.6 %
    pull = random(10, 24, seed=3)
    out.backward(pull)
    inside = (turned.abs() < 448 * scale).double()
    assert inside.mean() < 1
    torch.testing.assert_close(inputs.grad.double(), ((pull.double() @ weight) * inside) @ turn.t(), atol=1e-5, rtol=1e-5)


def test_scales_are_the_mean_of_the_first_passes_and_then_follow_slowly():
    scale = InputScale(online=3).train()
    seen, before = [], 0.0
    for n in range(150):
        given = torch.full((1, 4), float(n % 5 + 1))
        used = float(scale(given)) * E4M3_MAX
        assert used == pytest.approx(n % 5 + 1 if n < 3 else before, rel=1e-5)
        scale(given)  # a layer that is computed again in backward counts once
        scale.move()
        seen.append(n % 5 + 1)
        before = sum(seen) / len(seen) if n < 100 else 0.99 * before + 0.01 * seen[-1]
        assert float(scale.input_scale) * E4M3_MAX == pytest.approx(before, rel=1e-4)
    scale.eval()
    scale(torch.full((1, 4), 100.0))
    scale.move()
    assert float(scale.passes) == 150


def test_layers_computed_again_move_scales_once():
    found = []
    for recompute in (False, True):
        decoder = make_decoder()
        prepare_training(decoder, spec_of("fp8-tensor-static-h"), online=1)
        step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig(), recompute=recompute)
        found.append([step([make_batch(), make_batch(seed=1)], n, 3e-3).loss for n in range(3)])
        assert float(decoder.layers[0].attn.qkv.matrix.static.passes) == 6
    assert found[0] == found[1]


def test_an_expert_that_read_nothing_has_a_scale():
    decoder = make_decoder(experts=True)
    prepare_training(decoder, spec_of("fp8-tensor-static-h"))
    experts = next(module for module in decoder.modules() if isinstance(module, QatFp8Experts))
    assert experts.packed().gate_up_input_fp8_scale.tolist() == pytest.approx([1 / 448] * experts.num_experts)
    for e, scale in ((0, 0.25), (1, 0.5)):
        experts.up_matrices[e].static.input_scale.fill_(scale)
        experts.up_matrices[e].static.passes.fill_(1)
    assert experts.packed().gate_up_input_fp8_scale.tolist() == [0.25, *[0.5] * (experts.num_experts - 1)]


def test_it_loses_less_than_rounding_to_nearest():
    layer = Linear(64, 48)
    with torch.no_grad():
        layer.weight.copy_(random(48, 64))
    x = random(400, 12, seed=1) @ random(12, 64, seed=2)
    wanted = layer(x).detach()
    nearest, packed = taught(QatFp8Linear(layer, Fp8Scheme("tensor", True, True), online=20), x, wanted, rate=1e-3, close=1e-5)
    assert packed < 0.8 * nearest


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="an embedding, which is not stored as fp8-block"):
        prepare_training(make_decoder(), QuantSpec.uniform("fp8-block"))
    with pytest.raises(ConfigError, match="turns 32 inputs at a time, and a matrix has 40"):
        QatFp8Linear(Linear(40, 8), Fp8Scheme("tensor", True, True), 1)
    with pytest.raises(ConfigError, match="ernie sft --qat fp8-tensor-static-h"):
        quantise_model(make_decoder(), spec_of("fp8-tensor-static-h"))
