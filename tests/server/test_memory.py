"""Memory shared out between models: what is idle leaves for what is asked for, what can never fit is refused with the numbers."""

import asyncio

import httpx
import pytest

from ernie45.config import Environment
from ernie45.engine.core import EngineConfig
from ernie45.errors import ConfigError
from ernie45.models.memory import Held, MemoryPlan, plan_memory
from ernie45.models.vision_config import ModelConfig
from ernie45.server.build import build
from ernie45.server.settings import EngineSettings, ServerSettings, parse_bytes
from tests.engine.test_engine import DENSE
from tests.engine.tiny_folder import save_tiny

GIB = 1 << 30


def plan(weights, cache=4):
    return MemoryPlan(weights=weights * GIB, work=GIB, sequence=GIB, length=2048, cache=cache * GIB)


def ask(running, model, **more):
    body = {"model": model, "messages": [{"role": "user", "content": "«hi»"}], **more}
    return running.post("/v1/chat/completions", body)


def states(running):
    return {model.name: model.state for model in running.service.models}


def test_the_model_unused_for_longest_leaves_when_another_needs_its_place(serve, until):
    plans = {name: plan(2, cache=1) for name in ("one", "two", "three", "four")}
    running = serve(models=tuple(plans), plans=plans, memory="12GiB")
    for name in ("one", "two", "three", "one"):
        assert ask(running, name).status_code == 200
    assert [model.granted // GIB for model in running.service.models] == [4, 4, 4, 0]
    assert ask(running, "four").status_code == 200
    assert states(running) == {"one": "ready", "two": "cold", "three": "ready", "four": "ready"}
    assert sum(model.granted for model in running.service.models) <= running.service.memory
    assert ask(running, "two").status_code == 200
    assert states(running)["three"] == "cold"
    assert any('"reason": "memory for two"' in line for line in running.lines)


def test_a_cache_gets_what_it_can_use_within_half_of_the_rest(serve):
    running = serve(models=("one", "two"), plans={"one": plan(2, cache=100), "two": plan(1, cache=2)}, memory="20 GiB")
    ask(running, "two")
    assert [model.granted / GIB for model in running.service.models] == [3 + 17 / 2, 2 + 2]
    assert running.client().get("/status.json").json()["models"][1]["memory"] == 4 * GIB


def test_what_can_never_fit_is_a_503_with_the_numbers(serve):
    running = serve(models=("one", "two"), plans={"one": plan(1), "two": plan(30)}, memory="20GiB")
    response = ask(running, "two")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_too_large")
    assert "needs 32.00 GiB (weights 30.00 GiB" in response.text
    assert "together have 20.00 GiB" in response.text
    assert states(running) == {"one": "ready", "two": "failed"}, "nobody left for it"


def test_busy_models_stay_and_who_asks_is_told_to_come_back(serve, until):
    running = serve(models=("one", "two"), plans={"one": plan(8, cache=1), "two": plan(8, cache=1)}, memory="15GiB")
    running.engine.held.set()
    client = running.client()
    request = client.build_request("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "stream": True})
    opened = client.send(request, stream=True)
    until(lambda: running.service.models[0].busy == 1)
    response = ask(running, "two")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "memory_in_use")
    assert "5.00 GiB of 15.00 GiB are left" in response.text
    assert int(response.headers["retry-after"]) > 0
    running.engine.held.clear()
    opened.read()
    until(lambda: running.service.models[0].busy == 0)
    assert ask(running, "two").status_code == 200
    assert states(running) == {"one": "cold", "two": "ready"}
    assert running.client().get("/health/ready").status_code == 200


def test_sizes():
    assert [parse_bytes(text, "memory") for text in ("20GiB", "1.5 GB", "7", "3mib")] == [20 * GIB, 1_500_000_000, 7, 3 << 20]
    for text in ("", "much", "-1GiB", "0", "1XB", "1e9", "9" * 40):
        with pytest.raises(ConfigError, match="memory is"):
            ServerSettings(memory=text)


def test_two_real_folders_take_turns_where_only_one_fits(tmp_path):
    """Engines in processes of their own: the second one is read when the first one's process has ended."""
    for name, seed in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        decoder = save_tiny(tmp_path / name, DENSE, seed)
    how = {"max_length": 64, "max_running": 2, "token_budget": 32}
    weights = sum(tensor.nbytes for tensor in decoder.state_dict().values())
    use = EngineConfig(**how).use(decoder.config, decoder.dtype, adapters=False, packed=False)
    memory = int(1.5 * plan_memory(ModelConfig(decoder.config), Held(weights), use).least)
    settings = ServerSettings(port=0, memory=str(memory), engine=EngineSettings(threads=1, dtype="float32", **how))
    environment = Environment.read()

    async def run():
        service, app = build([str(tmp_path / name) for name in ("one", "two")], settings, environment, write=lambda line: None)
        first, second = service.models
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for name in ("one", "two", "one"):
                body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
                while (response := await client.post("/v1/chat/completions", json=body)).status_code == 503:
                    assert response.json()["error"]["code"] == "model_loading", response.text
                assert response.status_code == 200, response.text
                assert [model.state for model in (first, second)] == (["ready", "cold"] if name == "one" else ["cold", "ready"])
                assert 0 < first.granted + second.granted <= memory
        await service.close()

    asyncio.run(run())
