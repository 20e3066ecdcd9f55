"""Honour it or refuse it, walked: every field that OpenAI's and Anthropic's clients can send has an effect, or is a 400 that names it."""

import typing

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params
from openai.types import batch_create_params, file_create_params
from openai.types.responses import response_create_params

from ernie45.server import anthropic_types, responses_types
from ernie45.server.batches.routes import BatchRequest

RESPONSES = {"input": "«x»"}
MESSAGES = {"messages": [{"role": "user", "content": "«x»"}], "max_tokens": 8}


@pytest.fixture
def running(shared):
    """One server for the whole file: these tests leave nothing behind."""
    return shared


def names(kind):
    return {field.alias or name for name, field in kind.model_fields.items()}


def sent(params):
    """Names of the body's fields that a client can send."""
    return set(typing.get_type_hints(params)) - {"betas", "extra_headers"}


@pytest.mark.parametrize(
    ("params", "kind", "refused"),
    [
        (response_create_params.ResponseCreateParamsBase, responses_types.ResponsesRequest, responses_types.REFUSED),
        (message_create_params.MessageCreateParamsBase, anthropic_types.MessagesRequest, anthropic_types.REFUSED),
        (beta_params.MessageCreateParamsBase, anthropic_types.MessagesRequest, anthropic_types.REFUSED),
        (message_count_tokens_params.MessageCountTokensParams, anthropic_types.CountRequest, anthropic_types.REFUSED),
        (batch_create_params.BatchCreateParams, BatchRequest, {}),
        (file_create_params.FileCreateParams, None, {"file", "purpose", "expires_after"}),
    ],
    ids=["responses", "messages", "beta messages", "count_tokens", "batches", "files"],
)
def test_every_field_of_the_reference_is_honoured_or_refused(params, kind, refused):
    known = names(kind) if kind is not None else set()
    assert sent(params) - known - set(refused) - {"stream"} == set()
    assert not known & set(refused)


@pytest.mark.parametrize("name", sorted(responses_types.REFUSED))
def test_a_refused_field_of_responses_is_a_400_that_names_it(running, name):
    response = running.post("/v1/responses", RESPONSES | {name: {"some": "value"}})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert running.post("/v1/responses", RESPONSES | {name: None}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("name", sorted(anthropic_types.REFUSED))
def test_a_refused_field_of_messages_is_a_400_that_names_it(running, name, path):
    body = MESSAGES if path == "/v1/messages" else {"messages": MESSAGES["messages"]}
    response = running.post(path, body | {name: {"some": "value"}})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert name in error["message"]
    assert anthropic_types.REFUSED[name] in error["message"]


@pytest.mark.parametrize("name", sorted(anthropic_types.NEUTRAL))
def test_values_of_messages_that_ask_for_nothing_pass(running, name):
    for value in anthropic_types.NEUTRAL[name]:
        assert running.post("/v1/messages", MESSAGES | {name: value}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings"])
def test_an_unknown_field_is_named(running, path):
    body = {"/v1/responses": RESPONSES, "/v1/embeddings": {"input": "x"}}.get(path, MESSAGES)
    if path.endswith("count_tokens"):
        body = {"messages": MESSAGES["messages"]}
    response = running.post(path, body | {"surprise": 1})
    assert response.status_code == 400
    assert "surprise" in response.json()["error"]["message"]


def test_log_probabilities_of_prompts_are_not_streamed_and_that_is_said(running):
    for path, body, field in (
        ("/v1/chat/completions", {"messages": MESSAGES["messages"], "prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 0}, "logprobs"),
    ):
        assert running.post(path, body).status_code == 200
        response = running.post(path, body | {"stream": True})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
