"""Adapters over HTTP: listed, chosen as MODEL:ADAPTER on every route, refused in words, and never more at a time than the engine holds."""

import json

import msgspec
import pytest

from ernie45.errors import ConfigError
from ernie45.server.settings import EngineSettings


@pytest.fixture
def folder(tmp_path):
    for name in ("poet", "judge", "clerk"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "adapter_config.json").write_text("{}")
    return tmp_path / "adapters"


def hello(running, model, **more):
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "seed": 5, **more}
    return running.post("/v1/chat/completions", body)


def test_every_name_of_a_model_has_every_adapter(serve, folder):
    running = serve(models=("one",), adapters=folder, served_model_name=("alias",))
    cards = running.client().get("/v1/models").json()["data"]
    names = [card["id"] for card in cards]
    assert names[:4] == ["alias", "one", "alias:clerk", "alias:judge"]
    assert {card["id"]: card.get("parent") for card in cards}["one:poet"] == "one"
    assert running.client().get("/v1/models/alias:poet").json()["parent"] == "alias"
    (folder / "late").mkdir()
    (folder / "late" / "adapter_config.json").write_text("{}")
    assert hello(running, "one:late").status_code == 200, "folders may come while the server runs"


def test_the_engine_is_told_and_the_answer_says_so(serve, folder):
    running = serve(models=("one",), adapters=folder)
    answers = {name: hello(running, name).json() for name in ("one", "one:poet", "one:judge")}
    assert [answers[name]["model"] for name in answers] == list(answers)
    assert [request.adapter for request in running.engine.submitted] == ["", "poet", "judge"]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers.values()}) == 3


def test_every_route_takes_adapters(serve, folder):
    running = serve(models=("one",), adapters=folder)
    running.post("/v1/completions", {"model": "one:poet", "prompt": "x", "max_tokens": 2})
    running.post("/v1/responses", {"model": "one:poet", "input": "x", "max_output_tokens": 16})
    running.post("/v1/messages", {"model": "one:poet", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2})
    assert [request.adapter for request in running.engine.submitted] == ["poet"] * 3
    bare, adapted = (running.post("/v1/embeddings", {"model": name, "input": "x"}).json() for name in ("one", "one:poet"))
    assert bare["data"] != adapted["data"]


@pytest.mark.parametrize("name", ["one:nobody", "one:../secret", "one:", "one:poet:judge", "two:poet", "one:poet/../judge", "one:\u0000"])
def test_strange_names_are_404_with_what_there_is(serve, folder, name):
    running = serve(models=("one",), adapters=folder)
    response = hello(running, name)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "there is: clerk, judge, poet" in response.text or "there is: one" in response.text
    assert not running.engine.submitted


def test_without_a_folder_no_name_has_adapters(running):
    assert hello(running, "fake:poet").status_code == 404


def test_a_folder_that_is_not_there_ends_the_start(serve, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        serve(adapters=tmp_path / "nowhere")


def test_who_needs_one_adapter_too_many_waits_in_line(serve, folder, until):
    running = serve(models=("one",), adapters=folder, engine=EngineSettings(max_adapters=2))
    model = running.service.models[0]
    model.info = msgspec.structs.replace(model.info, max_adapters=2)
    running.engine.held.set()
    client = running.client()
    opened = []
    for name in ("one:poet", "one:judge", "one:clerk", "one:poet"):
        body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}
        request = client.build_request("POST", "/v1/chat/completions", json=body)
        opened.append(client.send(request, stream=True))
        until(lambda: model.busy == len(opened))
    assert [request.adapter for request in running.engine.submitted] == ["poet", "judge"]
    assert (model.running, model.waiting) == (2, 2)
    running.engine.held.clear()
    for response in opened:
        assert b"[DONE]" in response.read()
    assert [request.adapter for request in running.engine.submitted] == ["poet", "judge", "clerk", "poet"]
