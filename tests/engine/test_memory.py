"""The plan of memory: its weights are the loaded ones to the byte, and what cannot fit is refused before a byte is read."""

import dataclasses

import pytest
import torch

from ernie45.engine.client import LLM
from ernie45.engine.core import EngineConfig
from ernie45.engine.memory import check_fits, plan_memory
from ernie45.errors import ConfigError
from ernie45.models.counts import count_parameters, kv_bytes_per_token
from ernie45.models.load import load
from ernie45.models.on_the_fly import load_quantised
from ernie45.models.released import CHECKPOINTS
from ernie45.models.save import save_model
from ernie45.weights.stream import load_pieces
from tests.engine.test_engine import DENSE, EXPERTS, build
from tests.engine.tiny_folder import save_tiny

GIB = 1 << 30
SETTINGS = {"page_size": 32, "num_pages": None, "max_length": None, "token_budget": 512, "max_running": 32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_the_weights_of_the_plan_are_those_in_memory(config, dtype, tmp_path):
    save_model(build(config), tmp_path)
    heard = []
    loaded = load(tmp_path, dtype=dtype, approve=lambda opened, compute, weights: heard.append(weights))
    assert heard == [sum(tensor.numel() * tensor.element_size() for tensor in loaded.decoder.state_dict().values())]


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["tied", "untied"])
def test_a_model_that_is_packed_as_it_loads_is_planned_to_the_byte(config, tmp_path):
    experts = config.experts and dataclasses.replace(config.experts, expert_size=64)
    save_model(build(dataclasses.replace(config, hidden_size=64, head_size=16, ffn_size=64, experts=experts)), tmp_path)
    heard = []
    loaded = load_quantised(tmp_path, "w4a8", dtype="float32", approve=lambda opened, compute, weights: heard.append(weights))
    assert heard == [sum(tensor.numel() * tensor.element_size() for tensor in loaded.decoder.state_dict().values())]


def test_what_does_not_fit_is_refused_before_a_byte_of_weights_is_read(tmp_path, monkeypatch):
    save_tiny(tmp_path, DENSE)
    monkeypatch.setattr("ernie45.models.load.load_pieces", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"does not fit: weights .* make .*, and 0.1 MiB are available"):
        LLM(tmp_path, memory=100_000)
    monkeypatch.setattr("ernie45.models.load.load_pieces", load_pieces)
    llm = LLM(tmp_path, memory=GIB)
    assert llm.plan.fixed + llm.limits.num_pages * 32 * 2 * 2 * 2 * 12 * 4 <= GIB
    assert "weights" in llm.settings()["memory"]


def plan_of(name, bytes_per_weight, **more):
    text = CHECKPOINTS[name].text
    weights = int(count_parameters(text).total * bytes_per_weight)
    return text, plan_memory(text, weights=weights, value_bytes=2, token_bytes=kv_bytes_per_token(text), **(SETTINGS | more))


def test_advice_names_what_would_help():
    text, plan = plan_of("ERNIE-4.5-21B-A3B", 2)
    check_fits(plan, 60 * GIB, "21B", text, packed=False)
    with pytest.raises(ConfigError, match=r"packs its weights to about 11\.\d+ GiB"):
        check_fits(plan, 20 * GIB, "21B", text, packed=False)
    with pytest.raises(ConfigError, match=r"a smaller model, or more memory; packed to 4 bits its weights would take 11\.\d+ GiB"):
        check_fits(plan, 8 * GIB, "21B", text, packed=False)
    text, long = plan_of("ERNIE-4.5-0.3B", 2, max_length=131_072)
    with pytest.raises(ConfigError, match=r"set max_length to at most \d+,\d+ tokens"):
        check_fits(long, long.fixed + long.sequence // 2, "0.3B", text, packed=False)


def test_a_plan_is_monotone_and_its_grant_never_more_than_what_is_left():
    _, plan = plan_of("ERNIE-4.5-0.3B", 4)
    larger = plan_of("ERNIE-4.5-0.3B", 4, token_budget=2048, max_running=64)[1]
    assert larger.work > plan.work
    assert larger.cache > plan.cache
    for left in range(plan.least, 40 * GIB, GIB):
        assert plan.least <= plan.grant(left) <= left
    assert dataclasses.replace(plan, adapters=7).fixed == plan.fixed + 7


def test_an_engine_reckons_with_its_own_settings():
    config = EngineConfig(max_length=64, page_size=16, adapter_bytes=1000)
    plan = config.plan(DENSE, torch.float32, 5, adapters=True)
    assert (plan.weights, plan.adapters, plan.length) == (5, 1000, 64)
    assert plan.sequence == 64 * 2 * 2 * 2 * 12 * 4
