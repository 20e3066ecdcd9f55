"""OpenAI's responses: whole, streamed, kept, gone on with, stopped; every field honoured or refused."""

import threading
import typing

import openai
import pytest
from openai.types.responses import response_create_params

from ernie45.engine.scheduler import SchedulerConfig
from ernie45.server.access import Caller
from ernie45.server.failures import Failure
from ernie45.server.responses_store import Kept, ResponseStore
from ernie45.server.responses_types import REFUSED, ResponsesRequest

ROOMY = SchedulerConfig(token_budget=256, max_running=4, page_size=16, num_pages=512, max_length=4096)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture
def server(serve):
    return serve(chat_format="ernie-thinking", engine_limits=ROOMY, keys=("a:key-of-ada-1", "b:key-of-bob-1"))


@pytest.fixture
def ada(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-of-ada-1", max_retries=0) as client:
        yield client


def test_every_field_of_the_reference_is_honoured_or_refused():
    reference = set(typing.get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    known = {field.alias or name for name, field in ResponsesRequest.model_fields.items()}
    assert reference - known - set(REFUSED) == set()
    assert not known & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_is_a_400_that_names_it(running, name):
    response = running.post("/v1/responses", {"input": "x", name: {"some": "value"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name


def test_a_whole_response(ada):
    response = ada.responses.create(model="fake", input="«hm</think>\n\nHello wörld»", instructions="be kind", metadata={"a": "b"})
    assert response.output_text == "Hello wörld"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "hm"
    assert response.status == "completed"
    assert response.metadata == {"a": "b"}
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_stream_ends_with_what_the_whole_is(ada):
    said = f"«hm</think>\n\nSee:{CALL}»"
    with ada.responses.stream(model="fake", input=said, tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "See:"
    assert "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta") == '{"city": "Paris"}'
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [item.id for item in final.output]


def test_a_cut_response_is_incomplete(ada):
    response = ada.responses.create(model="fake", input="«</think>hello»", max_output_tokens=4)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_kept_fetched_gone_on_with_and_forgotten(ada, server):
    first = ada.responses.create(model="fake", input=f"«</think>{CALL}»", tools=[TOOL])
    [call] = [item for item in first.output if item.type == "function_call"]
    assert ada.responses.retrieve(first.id).output == first.output
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}, {"role": "user", "content": "«</think>wet»"}]
    second = ada.responses.create(model="fake", input=outputs, previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "wet"
    prompt = server.engine.fake.tokenizer.decode(server.engine.submitted[-1].prompt, skip_special=False)
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    ada.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        ada.responses.retrieve(first.id)
    third = ada.responses.create(model="fake", input="«</think>x»", store=False)
    with pytest.raises(openai.NotFoundError):
        ada.responses.retrieve(third.id)


def test_responses_of_others_are_not_seen(ada):
    mine = ada.responses.create(model="fake", input="«</think>x»")
    bob = ada.with_options(api_key="key-of-bob-1")
    for forbidden in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            forbidden(mine.id)
    with pytest.raises(openai.NotFoundError):
        bob.responses.create(model="fake", input="x", previous_response_id=mine.id)


def test_a_response_can_be_stopped(ada, server, until):
    server.engine.held.set()
    thread = threading.Thread(target=lambda: ada.responses.create(model="fake", input="«</think>never»"))
    thread.start()
    until(lambda: server.service.live)
    [id] = server.service.live
    with pytest.raises(openai.NotFoundError):
        ada.with_options(api_key="key-of-bob-1").responses.cancel(id)
    assert ada.responses.cancel(id).status == "cancelled"
    thread.join(10)
    assert not thread.is_alive()
    assert server.engine.fake.idle


def test_schemas(serve):
    running = serve()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    body = running.post("/v1/responses", {"input": "no", "text": {"format": form}, "max_output_tokens": 50}).json()
    assert body["output"][0]["content"][0]["text"].startswith('{"a": ')


@pytest.mark.parametrize(
    "given",
    [
        [],
        [{"type": "web_search_call"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}],
        [{"role": "user"}],
        5,
    ],
)
def test_wrong_input_is_a_400(running, given):
    assert running.post("/v1/responses", {"input": given}).status_code == 400


def test_the_store_forgets_the_oldest():
    store, me = ResponseStore(most=2, characters=100), Caller("me", owner="me")
    for n, size in enumerate((10, 10, 10, 95)):
        store.keep(Kept("me", {"id": str(n)}, (), size))
    assert store.find("3", me).size == 95
    for n in "012":
        with pytest.raises(Failure):
            store.find(n, me)
