"""LangChain, LiteLLM and Instructor run unchanged: streams, tools, structured answers, errors."""

import asyncio
import importlib

import instructor
import langchain_openai
import openai
import pytest
from pydantic import BaseModel

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
PLACE = '{"city": "Paris", "people": 2}'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# LiteLLM's own types warn when pydantic builds them.
pytestmark = pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning", "ignore::DeprecationWarning:litellm")
HELLO = [{"role": "user", "content": "«hm</think>Hello wörld»"}]


class Place(BaseModel):
    """A city."""

    city: str
    people: int


@pytest.fixture(scope="module")
def url(roomy):
    return f"{roomy.url}/v1"


@pytest.fixture(scope="module")
def chain(url):
    client, asynchronous = openai.DefaultHttpxClient(), openai.DefaultAsyncHttpxClient()
    yield langchain_openai.ChatOpenAI(
        base_url=url, api_key="none", model="fake", max_retries=0, http_client=client, http_async_client=asynchronous
    )
    client.close()
    asyncio.run(asynchronous.aclose())


def test_langchain_whole_and_streamed(chain):
    assert chain.invoke("«hm</think>Hello wörld»").content == "Hello wörld"
    pieces = list(chain.stream("«hm</think>Hello wörld»"))
    assert len(pieces) > 3
    assert "".join(piece.content for piece in pieces) == "Hello wörld"
    assert chain.invoke("«hm</think>a»").usage_metadata["output_tokens"] > 2


def test_langchain_tools_and_structure(chain):
    answer = chain.bind_tools([TOOL]).invoke(f"«hm</think>{CALL}»")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Paris"})]
    assert chain.with_structured_output(Place, method="json_schema").invoke(f"«hm</think>{PLACE}»") == Place(city="Paris", people=2)


def test_langchain_errors(chain):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chain.invoke("«hm</think>a»", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        chain.invoke("«hm</think>a»", model="nobody")


@pytest.fixture(scope="module")
def litellm():
    """The package, kept from fetching its table of prices when it is imported; it wants an event loop that somebody else closes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield importlib.import_module("litellm")
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.01))
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def lite(url, litellm):
    common = {"model": "openai/fake", "api_base": url, "api_key": "none", "num_retries": 0, "max_retries": 0}
    return lambda **settings: litellm.completion(**(common | settings))


def test_litellm_whole_and_streamed(lite):
    assert lite(messages=HELLO).choices[0].message.content == "Hello wörld"
    pieces = [chunk.choices[0].delta.content or "" for chunk in lite(messages=HELLO, stream=True) if chunk.choices]
    assert "".join(pieces) == "Hello wörld"
    assert len(pieces) > 3


def test_litellm_tools_and_structure(lite):
    message = lite(messages=[{"role": "user", "content": f"«hm</think>{CALL}»"}], tools=[TOOL]).choices[0].message
    assert (message.tool_calls[0].function.name, message.tool_calls[0].function.arguments) == ("weather", '{"city": "Paris"}')
    schema = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": Place.model_json_schema()}}
    answer = lite(messages=[{"role": "user", "content": f"«hm</think>{PLACE}»"}], response_format=schema)
    assert Place.model_validate_json(answer.choices[0].message.content) == Place(city="Paris", people=2)


def test_litellm_errors(lite, litellm):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        lite(messages=HELLO, temperature=-1)
    with pytest.raises(litellm.NotFoundError):
        lite(messages=HELLO, model="openai/nobody")


@pytest.mark.parametrize("mode", [instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_instructor_gets_its_objects(url, mode):
    text = PLACE if mode is not instructor.Mode.TOOLS else f'<tool_call>\n{{"name": "Place", "arguments": {PLACE}}}\n</tool_call>\n'
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=mode)
        place = client.chat.completions.create(
            model="fake", response_model=Place, messages=[{"role": "user", "content": f"«hm</think>{text}»"}], max_retries=0
        )
    assert place.model_dump() == {"city": "Paris", "people": 2}


def test_instructor_streams_parts(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
        parts = list(
            client.chat.completions.create_partial(
                model="fake", response_model=Place, messages=[{"role": "user", "content": f"«hm</think>{PLACE}»"}]
            )
        )
    assert parts[-1].people == 2
    assert len(parts) > 2
