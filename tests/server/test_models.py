"""Several models behind one door: names, loading when asked for, unloading when idle, and what health, status and metrics say."""

import re

import pytest

from ernie45.errors import CheckpointError, ConfigError
from ernie45.server.model import read_sampling, read_text_side


def ask(running, model):
    return running.post("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "«hi»"}]})


def test_names(serve):
    running = serve(models=("one", "two"), served_model_name=("gpt-4o", "default"))
    assert [card["id"] for card in running.client().get("/v1/models").json()["data"]] == ["gpt-4o", "default", "one", "two"]
    for name in ("gpt-4o", "default", "one"):
        assert ask(running, name).json()["model"] == name
    assert running.client().get("/v1/models/two").json()["id"] == "two"
    assert running.client().get("/v1/models/three").status_code == 404


def test_two_models_of_one_name_are_refused(serve):
    with pytest.raises(ConfigError, match="'two'"):
        serve(models=("one", "two"), served_model_name=("two",))


def test_the_second_model_loads_when_it_is_asked_for_and_unloads_when_idle(serve, until):
    running = serve(models=("one", "two"), idle_seconds=0.3)
    first, second = running.service.models
    assert (first.state, second.state) == ("ready", "cold")
    assert ask(running, "two").status_code == 200
    assert second.state == "ready"
    until(lambda: second.state == "cold")
    assert first.state == "ready"
    assert ask(running, "two").json()["choices"][0]["message"]["content"] == "hi"


def test_a_model_that_cannot_be_loaded_is_a_503_that_keeps_its_secrets(serve):
    async def fails():
        raise CheckpointError("/secret/folder: no config.json")

    running = serve(loads=fails)
    response = ask(running, None)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_failed")
    assert "secret" not in response.text
    assert running.service.models[0].trouble.startswith("/secret")


def test_status_and_metrics(running, until):
    running.chat("«hello»")
    running.chat("x", max_tokens=3)
    [model] = running.client().get("/status.json").json()["models"]
    assert (model["state"], model["running"], model["waiting"]) == ("ready", 0, 0)
    assert model["pages"] == {"free": 128, "all": 128}
    page = running.client().get("/metrics").text

    def value(name, **labels):
        wanted = "".join(f'(?=[^}}]*{key}="{label}")' for key, label in labels.items())
        return float(re.search(rf"^{re.escape(name)}\{{{wanted}[^}}]*\}} (\S+)$", page, re.MULTILINE)[1])

    assert value("vllm:request_success_total", finished_reason="stop") == 1
    assert value("vllm:request_success_total", finished_reason="length") == 1
    assert value("vllm:generation_tokens_total", model_name="fake") == 6 + 3
    assert value("vllm:num_requests_running", model_name="fake") == 0
    assert value("vllm:kv_cache_usage_perc", model_name="fake") == 0
    assert value("vllm:time_to_first_token_seconds_count", model_name="fake") == 2
    assert value("ernie_http_requests_total", route="/v1/chat/completions", status="200") == 2
    running.client().get("/some/path/of/the/callers")
    assert "callers" not in running.client().get("/metrics").text


def test_the_openapi_page_has_every_body(running):
    page = running.client().get("/openapi.json").json()
    assert "$ref" not in str(page["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    fields = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"messages", "reasoning_max_tokens", "structured_outputs"} <= set(fields)


def test_sampling_comes_from_the_models_folder(tmp_path):
    assert read_sampling(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.8, "top_p": 0.7, "eos_token_id": 2, "top_k": null}')
    assert read_sampling(tmp_path) == {"temperature": 0.8, "top_p": 0.7}
    path.write_text('{"temperature": 0.8, "do_sample": false}')
    assert read_sampling(tmp_path) == {"temperature": 0.0}
    for wrong in ("[1]", "{"):
        path.write_text(wrong)
        with pytest.raises(CheckpointError):
            read_sampling(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_text_side(str(tmp_path), None)
