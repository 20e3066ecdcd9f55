"""The memory plan: its parts, and what it says about machines of common sizes."""

from dataclasses import replace

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.models import load
from ernie45.models.memory import Held, Use, advice, choices, gib, plan_memory
from ernie45.models.released import CHECKPOINTS
from ernie45.models.save import save_model
from ernie45.models.sizes import usual_spec, weight_bytes
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig
from tests.models.test_sizes import CONFIGS, SMALL_SIGHT

GIB = 2**30


def taken(plan):
    return f"{gib(plan.least)}: {plan.text()}"


def of(name):
    release = CHECKPOINTS[f"ERNIE-4.5-{name}"]
    return ModelConfig(release.text, release.vision)


def test_vl_28b_in_4_bits_fits_24_gib_and_nothing_larger_does():
    config = of("VL-28B-A3B")
    plans = {choice.name: choice.plan for choice in choices(config)}
    assert plans["4 bits"].least < 20 * GIB
    assert plans["8 bits"].least > 24 * GIB
    (first, *rest) = advice(config, 24 * GIB)
    assert first.startswith("4 bits fit into 24.00 GiB")
    assert "ernie quantize --scheme w4a8" in first
    assert rest == [f"8 bits, text only fit: {taken(plans['8 bits, text only'])} (ernie quantize --scheme w8a8, load with text_only)"]


def test_what_does_not_fit_is_said_with_the_number():
    (line,) = advice(of("VL-424B-A47B"), 64 * GIB)
    assert line.startswith("nothing fits into 64.00 GiB: even 4 bits, text only takes ")
    lines = advice(of("VL-28B-A3B"), 16 * GIB)
    assert lines[0] == "with its eyes it does not fit into 16.00 GiB"
    assert lines[1].startswith("4 bits, text only fit")
    assert advice(of("0.3B"), 8 * GIB)[0].startswith("16-bit floats fit")


def test_the_parts_of_a_plan():
    config, spec = of("VL-28B-A3B"), usual_spec(of("VL-28B-A3B"), "w4a8-g64")
    held = Held(weight_bytes(config, spec), mapped=10 * GIB)
    plan = plan_memory(config, held, Use(value_bytes=2, max_length=1000, adapter_bytes=7))
    assert plan.sequence == plan.cache == 1024 * 57_344, "whole pages"
    assert plan.parts() == {
        "mapped weights": 10 * GIB,
        "weights": held.total - 10 * GIB,
        "work": plan.work,
        "tokenizer": 103_424 * 1024,
        "pictures": 512 << 20,
        "adapters": 7,
    }
    assert plan.total == sum(plan.parts().values()) + plan.cache
    blind = plan_memory(replace(config, vision=None), held, Use(value_bytes=2, max_length=1000))
    patches = 6177 * 4
    assert plan.work - blind.work > patches * (588 * 4 + 6 * 1280 * 2), "the largest picture under way"
    assert (blind.pictures, blind.adapters) == (0, 0)
    assert "mapped weights 10.00 GiB + weights" in plan.text()
    assert "+ pictures 512.0 MiB" in plan.text().replace("0.50 GiB", "512.0 MiB")
    assert plan.text().endswith("(1,024 tokens)")


def test_a_native_step_takes_less_than_one_layer_by_layer():
    config = of("21B-A3B")
    plans = [plan_memory(config, Held(1), Use(value_bytes=4, native=native)) for native in (True, False)]
    assert plans[0].work < plans[1].work
    assert [plan_memory(config, Held(1), Use(value_bytes=4, step_tokens=n)).work for n in (512, 4096)] == sorted(
        plan_memory(config, Held(1), Use(value_bytes=4, step_tokens=n)).work for n in (4096, 512)
    )


def test_what_cannot_fit_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    decoder = Decoder(CONFIGS[3].text, SMALL_SIGHT).initialise(torch.Generator().manual_seed(0))
    save_model(decoder, tmp_path / "model")
    needed = weight_bytes(CONFIGS[3], float_bytes=4)
    monkeypatch.setattr(load, "available_memory", lambda: needed // 8)
    monkeypatch.setattr(load, "load_pieces", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"its weights take .* MiB are free. nothing fits into"):
        load.load_model(tmp_path / "model", dtype="float32")
