"""The limits table, and what bodies may be: each limit is passed once, and ends in the status the guide says."""

import json
import socket
import time

import pytest

SMALL = {
    "body_bytes": 4000, "json_depth": 8, "messages": 3, "prompts": 2, "n": 2, "stop": 2, "stop_characters": 5, "stop_token_ids": 2,
    "logit_bias": 2, "bad_words": 2, "tool_definitions": 1, "schema_bytes": 200,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f"}}

OVER = {
    "messages": ({"messages": [{"role": "user", "content": "x"}] * 4}, "messages"),
    "n": ({"n": 3}, "n"),
    "stop": ({"stop": ["a", "b", "c"]}, "stop"),
    "stop_characters": ({"stop": "abcdef"}, "stop"),
    "stop_token_ids": ({"stop_token_ids": [3, 4, 5]}, "stop_token_ids"),
    "logit_bias": ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
    "bad_words": ({"bad_words": ["a", "b", "c"]}, "bad_words"),
    "tool_definitions": ({"tools": [TOOL, TOOL]}, "tools"),
    "schema_bytes": ({"guided_regex": "a" * 300}, "guided_regex"),
}


@pytest.fixture
def tight(serve):
    return serve(limits=SMALL)


@pytest.mark.parametrize("limit", OVER)
def test_passing_a_limit_is_a_400_that_names_the_field(tight, limit):
    fields, param = OVER[limit]
    response = tight.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_too_many_prompts(tight):
    assert tight.post("/v1/completions", {"prompt": ["a", "b", "c"]}).status_code == 400
    assert tight.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}).status_code == 400
    assert tight.post("/v1/completions", {"prompt": ["a", "b"]}).status_code == 200


def test_a_large_body_is_a_413_whether_it_says_so_or_not(tight):
    whole = tight.chat("x" * 5000)
    assert whole.status_code == 413
    pieces = tight.client().post(
        "/v1/chat/completions", content=(b"x" * 1000 for _ in range(10)), headers={"content-type": "application/json"}
    )
    assert pieces.status_code == 413
    assert pieces.json()["error"]["type"] == "request_too_large"


def raw(running, data, kind="application/json"):
    return running.client().post("/v1/chat/completions", content=data, headers={"content-type": kind})


def test_a_deep_body_is_a_400(tight):
    deep = '{"messages": ' + "[" * 20 + "]" * 20 + "}"
    assert "nested" in raw(tight, deep).json()["error"]["message"]
    quoted = json.dumps({"messages": [{"role": "user", "content": "«" + "[" * 20 + "»"}]})
    assert raw(tight, quoted).json()["choices"][0]["message"]["content"] == "[" * 20


@pytest.mark.parametrize("data", ["5", '"text"', "[1]", "null", "true", "", "{", '{"a": 1', "\x00", "{'a': 1}", "NaN"])
def test_bodies_that_are_no_object_are_a_400(running, data):
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = running.client().post(path, content=data, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_that_are_not_finite_are_a_400(running, field, word):
    response = raw(running, '{"messages": [{"role": "user", "content": "x"}], "%s": %s}' % (field, word))  # noqa: UP031
    assert response.status_code == 400


def test_odd_bodies(running):
    assert raw(running, b'{"messages": "\xff"}').status_code == 400
    assert "twice" in raw(running, '{"seed": 1, "seed": 2}').json()["error"]["message"]
    assert "surrogate" in raw(running, '{"messages": [{"role": "user", "content": "\\ud800"}]}').json()["error"]["message"]
    assert raw(running, '{"messages": [{"role": "user", "content": "«\\ud83d\\ude42»"}]}').status_code == 200
    assert raw(running, "{}", "text/plain").status_code == 415
    assert raw(running, "{}", "application/x-www-form-urlencoded").status_code == 415
    assert running.chat("\x00\x07\u202e", max_tokens=1).status_code == 200


@pytest.mark.parametrize("prompt", ["", [], [[]], [""]])
def test_an_empty_prompt_is_a_400(running, prompt):
    response = running.post("/v1/completions", {"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def lines_of(running, data, seconds=5.0):
    """What the server sends on a bare connection, until it closes it."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as link:
        link.sendall(data)
        got = b""
        while part := link.recv(65536):
            got += part
        return got


def test_a_body_that_does_not_come_is_a_408(serve):
    running = serve(limits={"read_seconds": 0.3})
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    assert lines_of(running, head).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("data", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: lo"])
def test_a_header_that_does_not_come_ends_the_connection(serve, data):
    running = serve(limits={"read_seconds": 0.3})
    began = time.monotonic()
    try:
        got = lines_of(running, data)
    except ConnectionResetError:
        got = b""
    assert got == b""
    assert time.monotonic() - began < 3


def test_a_huge_header_is_refused(running):
    try:
        got = lines_of(running, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 200_000 + b"\r\n\r\n")
    except ConnectionError:  # it was closed on us before we had sent all of it
        got = b"HTTP/1.1 400"
    assert got.startswith(b"HTTP/1.1 400")


def test_two_ways_to_say_the_length_are_refused(running):
    got = lines_of(
        running,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ncontent-length: 9\r\n\r\n{}{}GET /x HTTP/1.1\r\n\r\n",
    )
    assert got.startswith(b"HTTP/1.1 400")
    assert got.count(b"HTTP/1.1") == 1
