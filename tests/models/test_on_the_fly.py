"""Models quantised while they are loaded: equal to quantising the loaded model, bounded in memory, and refused where it makes no sense."""

import dataclasses

import pytest
import torch

from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.load import load_model
from ernie45.models.on_the_fly import completed, load_quantised
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.quant.model import quantise_model
from ernie45.quant.rtn import round_quickly
from ernie45.quant.spec import QuantSpec

DENSE = TextConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=96, vocab_size=160, tie_embeddings=True
)
EXPERTS = dataclasses.replace(
    DENSE, tie_embeddings=False, experts=ExpertsConfig(num_experts=4, top_k=2, expert_size=32, num_shared=1, first_layer=1, last_layer=1)
)


def folder(tmp_path, config):
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.1), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("config", [DENSE, EXPERTS])
def test_it_equals_quantising_the_loaded_model(tmp_path, config):
    path = folder(tmp_path, config)
    stages = []
    fly = load_quantised(path, "w4a8", dtype="float32", progress=lambda *stage: stages.append(stage), environment=Environment.read())
    whole = load_model(path, dtype="float32")
    end = "embed" if config.tie_embeddings else "head"
    quantise_model(
        whole,
        QuantSpec.from_dict({"rules": [{"pattern": end, "scheme": "w8a8-g64-h"}, {"pattern": "*", "scheme": "w4a8-g64-h"}]}, ""),
        algorithm=round_quickly,
    )
    assert torch.equal(fly.decoder.prompt_logits([1, 2, 3]), whole.prompt_logits([1, 2, 3]))
    assert stages[-1][1:] == (2, 2)


def test_weights_alone_lose_less_than_weights_and_activations(tmp_path):
    """Same 4-bit weights; what is left of the difference to the float model is the activations' share."""
    path, tokens = folder(tmp_path, EXPERTS), list(range(1, 40))
    float_logits = load_model(path, dtype="float32").prompt_logits(tokens)
    lost = {}
    for scheme in ("w8a16", "w8a8", "w4a16"):
        decoder = load_quantised(path, scheme, dtype="float32", environment=Environment.read()).decoder
        assert {m.scheme.act_bits for m in decoder.modules() if hasattr(m, "scheme")} == {int(scheme[3:])}  # the head's as well
        lost[scheme] = float((decoder.prompt_logits(tokens) - float_logits).norm() / float_logits.norm())
    assert 0 < lost["w8a16"] < 0.9 * lost["w8a8"] < lost["w4a16"] < 0.3


def test_bfloat16_models_keep_their_scales_and_routers(tmp_path):
    decoder = load_quantised(folder(tmp_path, EXPERTS), "w8a8", dtype="bfloat16", environment=Environment.read()).decoder
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in decoder.state_dict().items()}
    assert kinds["weight_scale"] == kinds["gate_up_scale"] == torch.float16
    assert decoder.state_dict()["layers.1.ffn.router.weight"].dtype == torch.float32
    assert decoder.dtype == torch.bfloat16
    assert decoder.prompt_logits([1, 2, 3]).isfinite().all()


def test_words_are_completed_only_where_they_say_nothing():
    assert completed("w4a8") == "w4a8-g64-h"
    assert completed("w8a16") == "w8a16-g64-h"
    assert completed("w4a8-g32") == "w4a8-g32"


def test_what_makes_no_sense_is_refused(tmp_path):
    path = folder(tmp_path, DENSE)
    with pytest.raises(ConfigError, match="w4a8"):
        load_quantised(path, "w3a8", environment=Environment.read())
    with pytest.raises(ConfigError, match="loaded already"):
        LLM(load_model(path), quantize="w4a8")
    (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        load_quantised(path, "w4a8", environment=Environment.read())
