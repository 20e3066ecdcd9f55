"""Vision-language models quantised: every matrix has a rule, what text never reaches is rounded without data, and pictures still pass."""

import json
from dataclasses import replace

import pytest
import torch

from ernie45.models.load import load, load_model
from ernie45.models.on_the_fly import load_quantised
from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.sizes import SIGHT_RULES, weight_bytes
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.nn.moe import MixtureOfExperts
from ernie45.quant.linear import QuantExperts, QuantLinear
from ernie45.quant.methods import Streams, method_named, quantise_block
from ernie45.quant.spec import QuantSpec, Scheme
from ernie45.recipes.quantize import REPORT, QuantizeConfig, run
from tests.recipes.test_quantize import SMALL, folder  # noqa: F401  (a fixture: the tokenizer's files come from it)

VISION = VisionConfig(
    depth=2, size=32, num_heads=2, ffn_size=64, patch_size=4, expert_size=32, time_frequencies=4,
    image_id=200, video_id=200, image_start_id=201, image_end_id=202, video_start_id=203, video_end_id=204,
)  # fmt: skip
TOKENS = [1, 5, 201, *[200] * 6, 202, 7, 8]
GRID = (1, 4, 6)


def patches():
    return torch.randn(24, VISION.patch_values, generator=torch.Generator().manual_seed(1))


def sighted_decoder(seed=0):
    """A tiny decoder that sees, weights large enough that every part matters."""
    config = replace(tiny(experts=True, vocab_size=259), num_layers=2, hidden_size=64)
    return Decoder(config, VISION).initialise(torch.Generator().manual_seed(seed), std=0.12).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sighted(folder, tmp_path_factory):  # noqa: F811
    """Its folder, with the tokenizer of the text model's."""
    made = tmp_path_factory.mktemp("sighted") / "model"
    save_model(sighted_decoder(), made, companions=folder)
    return made


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_a_packed_folder_that_sees(sighted, tmp_path, environment, method) -> None:
    out = tmp_path / "small"
    assert run(QuantizeConfig(model=str(sighted), out=out, method=method, limit=2.0, scheme="w4a8", **SMALL), environment) == 0
    original, packed = load_model(sighted, dtype="float32"), load(out, dtype="float32")
    decoder = packed.decoder
    assert isinstance(decoder.layers[1].ffn.vision.experts, QuantExperts)
    assert isinstance(decoder.sight.tower.blocks[0].up, QuantLinear)
    assert isinstance(decoder.sight.resampler.project, QuantLinear)
    assert isinstance(decoder.sight.tower.patches.weight, torch.nn.Parameter), "the patch embedding stays whole"
    seen, lost = (model.prompt_logits(TOKENS, [(patches(), GRID)]) for model in (original, decoder))
    # 4 bits cost a tenth or two of the energy of random weights; noise, or a wrong bank, costs all of it
    assert (lost - seen).square().sum() < 0.3 * seen.square().sum()
    report = json.loads((out / REPORT).read_text())
    named = {matrix["name"]: matrix for layer in report["layers"] for matrix in layer["matrices"]}
    assert named["layers.1.ffn.vision.experts"]["tokens"] == 0, "no text passed it"
    assert (named["layers.1.ffn.experts"]["tokens"] > 0) == (method != "rtn")


def test_bytes_are_those_of_the_plan_and_text_only_saves_the_rest(sighted, tmp_path, environment) -> None:
    out = tmp_path / "small"
    assert run(QuantizeConfig(model=str(sighted), out=out, method="rtn", limit=2.0, **SMALL), environment) == 0
    whole, text = load(out, dtype="float32"), load(out, dtype="float32", text_only=True)
    for found, vision in ((whole, VISION), (text, None)):
        held = sum(tensor.numel() * tensor.element_size() for tensor in found.decoder.state_dict().values())
        assert held == weight_bytes(ModelConfig(found.decoder.config, vision), found.opened.spec, float_bytes=4)
    assert torch.equal(text.decoder.prompt_logits([1, 2, 3]), whole.decoder.prompt_logits([1, 2, 3]))
    assert "text_only" in text.opened.notes[-1]


def test_the_flag_keeps_the_eyes_whole(sighted, tmp_path, environment) -> None:
    out = tmp_path / "small"
    assert run(QuantizeConfig(model=str(sighted), out=out, method="rtn", vision="whole", limit=2.0, **SMALL), environment) == 0
    names = load_model(out).state_dict()
    assert not [name for name in names if name.startswith("sight.") and name.endswith("_packed")]
    assert "layers.1.ffn.vision.experts.down_packed" in names


def test_rules_of_the_plan_are_those_of_the_command(sighted, tmp_path, environment) -> None:
    out = tmp_path / "small"
    assert run(QuantizeConfig(model=str(sighted), out=out, method="rtn", limit=2.0, **SMALL), environment) == 0
    spec = QuantSpec.from_dict({"rules": json.loads((out / "config.json").read_text())["quantization_config"]["rules"]}, "config.json")
    assert [rule.pattern for rule in spec.rules[:2]] == [rule.pattern for rule in SIGHT_RULES]
    assert spec.rules[0].scheme is None
    assert spec.rules[1].scheme is not None
    assert Scheme.parse(spec.rules[1].scheme).weight_bits == 8


def test_packed_as_it_loads(sighted) -> None:
    original, packed = load_model(sighted, dtype="float32"), load_quantised(sighted, "w8a8", dtype="float32").decoder
    assert isinstance(packed.layers[1].ffn.vision.experts, QuantExperts)
    assert isinstance(packed.sight.tower.blocks[0].up, QuantLinear)
    assert isinstance(packed.sight.tower.patches.weight, torch.nn.Parameter)
    seen, lost = (model.prompt_logits(TOKENS, [(patches(), GRID)]) for model in (original, packed))
    assert (lost - seen).square().sum() < 0.01 * seen.square().sum()  # 8 bits: a rounding of 1 in 254 each way


def test_what_sees_takes_its_share_when_the_norm_is_widened() -> None:
    """AWQ divides the norm by factors; whatever reads it must be multiplied by them, or pictures would break while text stays right."""
    decoder = sighted_decoder()
    block, original = decoder.layers[1], sighted_decoder().layers[1]
    with torch.no_grad():
        for one in (block, original):
            one.ffn_norm.weight[:8] = 8.0  # a few large inputs: the case that widening is for
    x_SLD = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(2))
    turns_LP = torch.polar(torch.ones(32, 16), torch.zeros(32, 16))
    names = ["attn.qkv", "attn.out", "ffn.experts", "ffn.shared.gate_up", "ffn.shared.down"]
    schemes = {f"b.{name}": Scheme.parse("w4a8-g32") for name in names} | {"b.ffn.vision.experts": None}
    packed, _ = quantise_block(block, "b", schemes, method_named("awq"), Streams(x_SLD, x_SLD, turns_LP, 1))
    assert isinstance(packed.ffn, MixtureOfExperts)
    factors = original.ffn_norm.weight / packed.ffn_norm.weight
    assert factors.max() / factors.min() > 1.01, "nothing was widened, so nothing would be shown"
    torch.testing.assert_close(packed.ffn.vision.router.weight, original.ffn.vision.router.weight * factors)
    torch.testing.assert_close(packed.ffn.vision.experts.gate_up, original.ffn.vision.experts.gate_up * factors)
