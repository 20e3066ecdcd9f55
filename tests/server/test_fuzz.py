"""Whatever is sent, the server answers with an error of its own or not at all: never a 500, and nothing stays behind."""

import asyncio
import contextlib
import gc
import json
import random
import socket
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

POSTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize",
    "/detokenize", "/apply_template",
)  # fmt: skip
QUICK = settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
FEW = settings(QUICK, max_examples=3)
GOOD = {
    "messages": [{"role": "user", "content": "«yes»"}],
    "prompt": "«yes»",
    "input": "«yes»",
    "tokens": [70],
    "max_tokens": 2,
    "max_output_tokens": 2,
}
"""What makes a request that would be answered; a route takes of it the fields that it has."""
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([1e308, -1e308, 10**40, -0.0]))
NOISE = st.sampled_from(["\x00", "\x1b[31m", "\u202e", "\ufdd0", "😀" * 50])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def operations(shared):
    """What the OpenAPI page offers, one by one. Without schemathesis' plugin for pytest, which breaks with the pytest used here."""
    page = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    return [found.ok() for found in page.get_all_operations()]


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_openapi_page_leads_to_no_500(operations, mode):
    """Bodies and parameters as the page says (positive) and as it says they are not."""
    if mode.is_negative:
        operations = [operation for operation in operations if operation.body]  # without one there is little to be wrong
    with requests.Session() as session:
        for operation in operations:

            @FEW
            @given(case=operation.as_strategy(mode))
            def visit(case):
                case.call_and_validate(checks=[not_a_server_error], session=session, timeout=30)

            visit()


def test_the_openapi_page_names_every_route(shared):
    page = httpx.get(f"{shared.url}/openapi.json").json()
    paths = set(page["paths"])
    assert set(POSTS) <= paths
    for path in POSTS:
        operation = page["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["properties"], path
        assert "200" in operation["responses"]
        assert "422" not in operation["responses"], "what we answer is a 400"


@QUICK
@given(path=st.sampled_from(POSTS), body=JSON)
def test_any_json_is_answered(shared, path, body):
    answer = httpx.post(f"{shared.url}{path}", content=json.dumps(body), headers={"content-type": "application/json"}, timeout=20)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    assert answer.headers["x-request-id"]


@pytest.fixture(scope="module")
def fields(shared):
    """The fields of each route's body."""
    paths = httpx.get(f"{shared.url}/openapi.json").json()["paths"]
    return {path: sorted(paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]) for path in POSTS}


@QUICK
@given(data=st.data(), path=st.sampled_from(POSTS))
def test_odd_values_of_known_fields_are_answered(shared, fields, data, path):
    body = {"model": "fake"} | {name: value for name, value in GOOD.items() if name in fields[path]}
    for name in data.draw(st.lists(st.sampled_from(fields[path]), min_size=1, max_size=2)):
        body[name] = data.draw(st.one_of(JSON, NOISE, NOISE.map(lambda noise: [{"role": "user", "content": noise}])), label=name)
    answer = httpx.post(f"{shared.url}{path}", content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code < 500, answer.text


@QUICK
@given(raw=st.binary(max_size=200))
def test_any_bytes_on_the_wire_leave_the_server_whole(shared, raw):
    with socket.create_connection(_place(shared.url), 10) as link, contextlib.suppress(OSError):
        link.sendall(raw + b"\r\n\r\n")
        link.settimeout(0.05)
        assert b" 500 " not in link.recv(4096)[:40]
    assert httpx.get(f"{shared.url}/health/live").status_code == 200


def _place(url):
    found = urlsplit(url)
    return found.hostname, found.port


def test_half_requests_and_slow_writers_take_no_place(serve, until):
    running = serve(limits={"read_seconds": 0.4})
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n"
    links = []
    for part in (head[:20], head, head + b'{"prompt": "a', b""):
        links.append(socket.create_connection(_place(running.url), 10))
        links[-1].sendall(part)
    assert running.chat("«still here»").status_code == 200
    for link in links:
        link.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while link.recv(4096):
                pass  # a 408 or nothing, and then the end
        link.close()
    until(lambda: not [c for c in running.server.server_state.connections if c.transport.is_closing() is False and c.cycle is None])


async def _visitor(client, dice, seen):
    """One client that reads to the end, leaves in the middle, or cancels."""
    count = dice.randrange(1, 40)
    text = [{"role": "user", "content": f"«{'word ' * count}»"}]
    body = {"messages": text, "stream": dice.random() < 0.7, "max_tokens": count, "n": dice.choice([1, 1, 3])}
    patience = dice.choice([30, 30, 0.0, 0.01, 0.05])
    with contextlib.suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(patience), client.stream("POST", "/v1/chat/completions", json=body) as answer:
            seen.append(answer.status_code)
            leaves = dice.random() < 0.4
            async for _ in answer.aiter_bytes():
                if leaves:
                    break


def test_many_who_come_and_go_leave_nothing(shared, until):
    process = psutil.Process()

    async def crowd(rounds, seed):
        dice, seen = random.Random(seed), []
        async with httpx.AsyncClient(base_url=shared.url, timeout=30) as client:
            for _ in range(rounds):
                await asyncio.gather(*(_visitor(client, dice, seen) for _ in range(8)))
        return seen

    def tasks():
        return len(asyncio.all_tasks(shared.loop))

    def settled():
        until(lambda: shared.engine.fake.idle and not shared.service.live and not shared.server.server_state.tasks, 20)
        shared.engine.fake.verify()
        time.sleep(0.1)
        gc.collect()
        return process.num_fds(), tasks(), process.memory_info().rss

    asyncio.run(crowd(4, 1))
    before = settled()
    seen = asyncio.run(crowd(12, 2))
    after = settled()
    assert set(seen) <= {200, 503}
    assert len(seen) > 20, "the patient at least have seen their answers begin"
    assert after[0] <= before[0] + 4, "sockets stay open"
    assert after[1] <= before[1] + 2, "tasks stay alive"
    assert after[2] <= before[2] + (24 << 20), "memory grows"
