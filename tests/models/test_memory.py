"""The memory plan: exact bytes of the real modules, and what it says about machines of common sizes."""

from dataclasses import replace

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.models import load
from ernie45.models.memory import advice, choices, matrices, plan_memory, usual_spec, weight_bytes
from ernie45.models.names import FLOAT32_ENDINGS
from ernie45.models.released import CHECKPOINTS, RELEASES, tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.quant.model import prepare_model, quantisable
from ernie45.quant.spec import QuantSpec, Rule

GIB = 2**30
SMALL_SIGHT = VisionConfig(depth=2, size=32, num_heads=2, ffn_size=72, patch_size=3, expert_size=24, time_frequencies=4)


CONFIGS = [
    ModelConfig(tiny()),
    ModelConfig(replace(tiny(num_mtp=1), tie_embeddings=False, use_bias=True)),
    ModelConfig(replace(tiny(experts=True), use_bias=True, head_bias=True)),
    ModelConfig(tiny(experts=True), SMALL_SIGHT),
    ModelConfig(replace(tiny(experts=True), tie_embeddings=False), SMALL_SIGHT),
]


def held(decoder, float_bytes):
    """Bytes of a network as it would be held."""
    sizes = {torch.uint8: 1, torch.float16: 2}
    return sum(
        tensor.numel() * (4 if name.endswith(FLOAT32_ENDINGS) else sizes.get(tensor.dtype, float_bytes))
        for name, tensor in decoder.state_dict().items()
    )


@pytest.mark.parametrize("word", [None, "w8a8", "w4a8-g32", "w4a8-g64"])
@pytest.mark.parametrize("config", CONFIGS)
def test_bytes_equal_the_modules(config, word):
    spec = QuantSpec(rules=(Rule(pattern="*.attn.out", scheme=None), Rule(pattern="*", scheme=word))) if word else None
    with torch.device("meta"):
        decoder = Decoder(config.text, config.vision)
        assert {matrix.name for matrix in matrices(config)} == {name for name, _ in quantisable(decoder)}
        if spec:
            prepare_model(decoder, spec)
    assert weight_bytes(config, spec) == held(decoder, 2)
    assert weight_bytes(config, spec, float_bytes=4) == held(decoder, 4)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_bytes_of_every_release(release):
    config = ModelConfig(release.text, release.vision)
    with torch.device("meta"):
        decoder = Decoder(release.text, release.vision)
    assert weight_bytes(config) == held(decoder, 2)


def of(name):
    release = CHECKPOINTS[f"ERNIE-4.5-{name}"]
    return ModelConfig(release.text, release.vision)


def test_vl_28b_in_4_bits_fits_24_gib_and_nothing_larger_does():
    config = of("VL-28B-A3B")
    plans = {choice.name: choice.plan for choice in choices(config)}
    assert plans["4 bits"].total < 20 * GIB
    assert plans["8 bits"].total > 24 * GIB
    (first, *rest) = advice(config, 24 * GIB)
    assert first.startswith("4 bits fit into 24.00 GiB")
    assert "ernie quantize --scheme w4a8" in first
    assert rest == [f"8 bits, text only fit: {plans['8 bits, text only']} (ernie quantize --scheme w8a8, load with text_only)"]


def test_what_does_not_fit_is_said_with_the_number():
    (line,) = advice(of("VL-424B-A47B"), 64 * GIB)
    assert line.startswith("nothing fits into 64.00 GiB: even 4 bits, text only takes ")
    lines = advice(of("VL-28B-A3B"), 16 * GIB)
    assert lines[0] == "with its eyes it does not fit into 16.00 GiB"
    assert lines[1].startswith("4 bits, text only fit")
    assert advice(of("0.3B"), 8 * GIB)[0].startswith("16-bit floats fit")


def test_the_parts_of_a_plan():
    config = of("VL-28B-A3B")
    plan = plan_memory(config, usual_spec(config, "w4a8-g64"), context=1000)
    assert plan.cache == 1000 * 57_344
    assert plan.total == plan.weights + plan.cache + plan.work
    assert plan.sight == plan.weights - plan_memory(replace(config, vision=None), usual_spec(config, "w4a8-g64")).weights
    assert plan_memory(of("0.3B")).sight == 0


def test_what_cannot_fit_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    decoder = Decoder(CONFIGS[3].text, SMALL_SIGHT).initialise(torch.Generator().manual_seed(0))
    save_model(decoder, tmp_path / "model")
    needed = weight_bytes(CONFIGS[3], float_bytes=4)
    monkeypatch.setattr(load, "available_memory", lambda: needed // 8)
    monkeypatch.setattr(load, "load_pieces", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"its weights take .* GiB are free. nothing fits into"):
        load.load_model(tmp_path / "model", dtype="float32")
