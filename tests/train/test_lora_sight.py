"""Adapters on the seeing half: they start as nothing, merge to what they computed, and stand in files under the published names."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.adapter_layers import read_adapter_layers
from ernie45.models.adapters import load_adapter, put_adapters, save_adapter
from ernie45.models.save import save_model
from ernie45.models.vision_config import ModelConfig
from ernie45.nn.lora import LoraConfig, LoraExperts, adapters, merge
from ernie45.nn.row_adapters import StepAdapters, beside
from ernie45.tokens.patches import patches
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.sighted import RULES, noise, noise_batch, placed, sighted_decoder
from tests.train.conftest import make_decoder

PICTURE = noise(2, 3)
IDS, _ = placed(5, 9, PICTURE, 7, 8)
# float32, other order of sums, logits up to 10
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def logits(decoder):
    return decoder.prompt_logits(IDS, [(torch.from_numpy(patches(PICTURE, RULES)), PICTURE.grid)])


def adapted(config):
    """A model that sees with adapters whose B is not 0."""
    decoder = sighted_decoder()
    put_adapters(decoder, config, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("adapter_b"):
                parameter.normal_(0, 0.05, generator=generator)
    return decoder


def where(decoder):
    """Of the adapted layers: those of the vision experts, of the tower, and of the resampler."""
    names = adapters(decoder)
    parts = (".vision.experts", "sight.tower.", "sight.resampler.")
    return tuple(sum(part in name for name in names) for part in parts)


@pytest.mark.parametrize(("vision", "found"), [("none", (0, 0, 0)), ("experts", (3, 0, 0)), ("all", (3, 9, 5))])
def test_adapters_stand_where_they_are_asked_for_and_start_as_nothing(vision, found):
    decoder = sighted_decoder()
    before = logits(decoder)
    put_adapters(decoder, LoraConfig(rank=2, vision=vision), 0)
    assert where(decoder) == found
    assert torch.equal(logits(decoder), before)
    assert {name.rpartition(".")[2] for name, p in decoder.named_parameters() if p.requires_grad} == {"adapter_a", "adapter_b"}


@pytest.mark.parametrize("dora", [False, True])
def test_merging_changes_no_logit(dora):
    decoder, plain = adapted(LoraConfig(rank=2, vision="all", dora=dora)), logits(sighted_decoder())
    said = logits(decoder)
    assert (said - plain).abs().max() > 0.05
    merge(decoder)
    assert set(decoder.state_dict()) == set(sighted_decoder().state_dict())
    torch.testing.assert_close(logits(decoder), said, **CLOSE)


@pytest.mark.parametrize("vision", ["experts", "all"])
def test_every_adapter_learns(vision):
    decoder = sighted_decoder()
    put_adapters(decoder, LoraConfig(rank=2, vision=vision), 0)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())
    for number in range(2):
        step([noise_batch((5, PICTURE, 7, 8, 9), (4, 6, 3))], number, 1e-2)
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in decoder.named_parameters() if p.requires_grad}


def test_files_have_the_published_names_and_are_read_back(tmp_path):
    decoder, config = adapted(LoraConfig(rank=2, vision="all")), LoraConfig(rank=2, vision="all")
    save_adapter(decoder, tmp_path / "adapter", config, "base")
    save_model(sighted_decoder(), tmp_path / "model")
    matrices = {name for name in load_file(tmp_path / "model" / "model.safetensors") if name.endswith("weight")}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    targets = {name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight" for name in written}
    assert targets < matrices, "each stands beside a matrix of the files"
    sees = {
        name
        for name in matrices
        if name.startswith(("vision_model", "model.resampler_model")) and "norm" not in name and ".ln." not in name
    }
    linear = {name for name in sees if not name.endswith((".3.weight",))}
    assert linear <= targets
    assert sum(".experts.8." in name for name in written) == 3 * 2 * 3, "vision experts are counted on behind the eight of text"
    again = sighted_decoder()
    assert load_adapter(again, tmp_path / "adapter") == LoraConfig(rank=2, alpha=4.0, vision="all")
    assert torch.equal(logits(again), logits(decoder))
    assert isinstance(adapters(again)["layers.1.ffn.vision.experts"], LoraExperts)


def test_an_adapter_of_vision_experts_serves_beside_the_bare_model(tmp_path):
    """What was taught is what the engine's rows compute from the files."""
    config = LoraConfig(rank=2, vision="experts")
    taught = adapted(config)
    save_adapter(taught, tmp_path / "adapter", config, "base")
    base, rows = sighted_decoder(), StepAdapters()
    layers, _ = read_adapter_layers(tmp_path / "adapter", base.model_config, torch.float32, 1 << 30)
    twin = beside(base, rows)
    rows.tell([(layers, range(len(IDS)))], len(IDS), base.sight.is_vision(torch.tensor(IDS)))
    torch.testing.assert_close(logits(twin), logits(taught), **CLOSE)
    assert (logits(base) - logits(taught)).abs().max() > 0.01


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.vision is 'all', and this model reads text alone"):
        put_adapters(make_decoder(), LoraConfig(vision="all"), 0)
    decoder = adapted(LoraConfig(rank=2, vision="all"))
    save_adapter(decoder, tmp_path / "adapter", LoraConfig(rank=2, vision="all"), "base")
    with pytest.raises(CheckpointError, match=r"changes what all requests see with; serve the model that the adapter was merged into"):
        read_adapter_layers(tmp_path / "adapter", decoder.model_config, torch.float32, 1 << 30)
    save_adapter(adapted(LoraConfig(rank=2, vision="experts")), tmp_path / "bank", LoraConfig(rank=2, vision="experts"), "base")
    with pytest.raises(CheckpointError, match=r"experts\.8\..*vision experts, which it was loaded without"):
        read_adapter_layers(tmp_path / "bank", ModelConfig(decoder.config), torch.float32, 1 << 30)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ernie45_vision": "some"}))
    with pytest.raises(CheckpointError, match="ernie45_vision is 'some'"):
        load_adapter(sighted_decoder(), tmp_path / "adapter")
