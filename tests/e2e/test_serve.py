"""`ernie serve` with the starter model, as a process of its own, through OpenAI's client."""

import json
import os
import re
import signal
import time

import openai
import pytest

from tests.serving import serving


@pytest.fixture(scope="module")
def server(starter):
    arguments = [str(starter), "--engine.threads", "1", "--engine.max-length", "2048", "--served-model-name", "starter"]
    with serving(*arguments, env={"ERNIE45_API_KEYS": "me:key-for-this-test"}) as made:
        yield made


@pytest.fixture(scope="module")
def process(server):
    return server.process


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-for-this-test", max_retries=0, timeout=120) as made:
        yield made


def children(process):
    """The numbers of the processes it has started, from any of its threads."""
    tasks = f"/proc/{process.pid}/task"
    found = set()
    for task in os.listdir(tasks):
        with open(f"{tasks}/{task}/children") as file:
            found |= set(file.read().split())
    return found


def ask(client, text, **fields):
    return client.chat.completions.create(model="starter", messages=[{"role": "user", "content": text}], temperature=0, **fields)


def test_it_says_what_it_serves_with(server):
    for word in (
        "listening on http://127.0.0.1:",
        "threads    1 ",
        "kernels    ",
        "1 thread",
        "context    2,048 tokens",
        "memory     weights ",
        "cache",
        "start      libraries ",
    ):
        assert word in server.told


def test_it_answers_whole_and_streamed_alike(client):
    whole = ask(client, "What is the capital of France?", max_tokens=16).choices[0].message.content
    assert "Paris" in whole
    chunks = ask(client, "What is the capital of France?", max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_it_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 120}},
        "required": ["age"],
        "additionalProperties": False,
    }
    said = ask(
        client, "How old is Ada?", max_tokens=30, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    )
    assert list(json.loads(said.choices[0].message.content)) == ["age"]


def test_a_shared_beginning_is_read_once(client):
    text = "The quick brown fox jumps over the lazy dog. " * 30
    ask(client, text + "One", max_tokens=1)
    second = ask(client, text + "Two", max_tokens=1)
    assert second.usage.prompt_tokens_details.cached_tokens > 200


def test_embeddings_of_like_texts_are_alike(client):
    one, near, far = (
        item.embedding
        for item in client.embeddings.create(
            model="starter",
            input=["The cat sat on the mat.", "A cat is sitting on a mat.", "Quarterly tax filings"],
            encoding_format="float",
        ).data
    )
    assert sum(a * b for a, b in zip(one, near, strict=True)) > sum(a * b for a, b in zip(one, far, strict=True))


def test_no_port_is_open_but_the_servers(process, client):
    """Row 2 of the security table: the engine is reached over an inherited pair of sockets."""
    pids = {str(process.pid), *children(process)}
    assert len(pids) == 2
    inodes = set()
    for pid in pids:
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = os.readlink(f"/proc/{pid}/fd/{name}") if os.path.lexists(f"/proc/{pid}/fd/{name}") else ""
            inodes |= set(re.findall(r"socket:\[(\d+)\]", link))
    listening = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            listening += [line.split()[1] for line in file.readlines()[1:] if line.split()[3] == "0A" and line.split()[9] in inodes]
    assert len(listening) == 1
    assert listening[0].startswith("0100007F:")


def test_keys_do_not_reach_the_engine(process):
    [child] = children(process)
    with open(f"/proc/{child}/environ", "rb") as file:
        assert b"key-for-this-test" not in file.read()
    with open(f"/proc/{process.pid}/cmdline", "rb") as file:
        assert b"key-for-this-test" not in file.read()


def test_on_sigterm_it_finishes_what_runs_and_ends(process, client):
    stream = ask(client, "Tell me a long story about a fox.", max_tokens=25, stream=True)
    first = next(iter(stream))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        ask(client, "x", max_tokens=1)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason in ("length", "stop")
    assert first.id == rest[-1].id
    assert process.wait(60) == 0
