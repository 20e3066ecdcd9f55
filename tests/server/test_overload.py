"""More work than fits, clients who go away or do not read, engines that die: who waits, who is told what, and that nothing is left over."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ernie45.engine.scheduler import SchedulerConfig

ONE = SchedulerConfig(token_budget=64, max_running=1, page_size=8, num_pages=64, max_length=256)


def later(function, *args, **fields):
    """Calls in a thread; `.result()` waits."""
    pool = ThreadPoolExecutor(1)
    return pool.submit(function, *args, **fields)


def test_a_full_line_is_a_503_with_retry_after(serve, until):
    running = serve(engine_limits=ONE, limits={"queue": 2})
    running.engine.held.set()
    inside = [later(running.chat, f"«{n}»") for n in range(3)]
    until(lambda: running.service.models[0].busy == 3)
    response = running.chat("«too many»")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    running.engine.held.clear()
    assert sorted(r.result().json()["choices"][0]["message"]["content"] for r in inside) == ["0", "1", "2"]
    assert running.chat("«again»").status_code == 200


ASKED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "«second»"}]},
    "/v1/completions": {"prompt": "«second»"},
    "/v1/messages": {"messages": [{"role": "user", "content": "«second»"}], "max_tokens": 9, "model": "fake"},
    "/v1/responses": {"input": "«second»"},
}


@pytest.mark.parametrize("route", ASKED)
@pytest.mark.parametrize("stream", [True, False])
def test_waiting_too_long_is_a_504_of_a_stream_too(serve, until, route, stream):
    running = serve(engine_limits=ONE, limits={"queue_seconds": 0.2})
    running.engine.held.set()
    first = later(running.chat, "«first»")
    until(lambda: running.service.models[0].running == 1)
    second = running.post(route, ASKED[route] | {"stream": stream})
    assert second.status_code == 504
    assert second.headers["content-type"] == "application/json"
    error = second.json()["error"]
    assert error["type" if route == "/v1/messages" else "code"] in ("queue_timeout", "timeout_error")
    assert "waited 0.2 s" in error["message"]
    running.engine.held.clear()
    assert first.result().status_code == 200


def test_a_request_that_takes_too_long_is_a_504_and_its_pages_are_free(serve, until):
    running = serve(limits={"request_seconds": 0.2})
    running.engine.held.set()
    assert running.chat("«never»").json()["error"]["code"] == "request_timeout"
    until(lambda: running.engine.fake.idle)
    assert running.engine.fake.load.free_pages == running.engine.limits.num_pages


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages_within_a_step(running, until, stream):
    running.engine.held.set()
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = running.url.removeprefix("http://").split(":")
    links = [socket.create_connection((host, int(port))) for _ in range(4)]
    for link in links:
        link.sendall(head.encode() + body)
    until(lambda: not running.engine.fake.idle and running.service.models[0].running == 4)
    steps = running.engine.steps
    for link in links:
        link.close()
    until(lambda: running.engine.fake.idle)
    assert running.engine.steps == steps, "no step was needed"
    assert running.engine.fake.load.free_pages == running.engine.limits.num_pages
    running.engine.held.clear()
    until(lambda: len(running.log()) == 4)
    assert {line["finish"] for line in running.log()} == {"cancelled"}


def test_who_waits_in_line_and_goes_away_is_never_computed(serve, until):
    running = serve(engine_limits=ONE)
    running.engine.held.set()
    first = later(running.chat, "«first»")
    until(lambda: running.service.models[0].running == 1)
    client = running.client()
    with pytest.raises(Exception, match="timed out"):
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=0.2)
    until(lambda: running.service.models[0].waiting == 0)
    running.engine.held.clear()
    first.result()
    assert len(running.engine.submitted) == 1


def test_a_quiet_stream_gets_comments(serve, until):
    running = serve(keep_alive_seconds=0.05)
    running.engine.held.set()
    with running.client().stream(
        "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "«x»"}], "stream": True}
    ) as response:
        lines = response.iter_lines()
        seen = []
        for line in lines:
            seen.append(line)
            if seen.count(": keep-alive") == 3:
                break
        running.engine.held.clear()
        rest = list(lines)
    assert "data: [DONE]" in rest


def test_who_waits_in_line_for_long_gets_comments_and_then_the_error_in_an_event(serve, until):
    """A proxy would cut a connection that says nothing; what has begun with 200 can only go on."""
    running = serve(engine_limits=ONE, limits={"queue_seconds": 0.6}, keep_alive_seconds=0.2)
    running.engine.held.set()
    first = later(running.chat, "«first»")
    until(lambda: running.service.models[0].running == 1)
    second = running.chat("«second»", stream=True)
    assert second.status_code == 200
    assert second.text.startswith(": keep-alive")
    assert "queue_timeout" in second.text
    running.engine.held.clear()
    assert first.result().status_code == 200


def test_a_reader_that_takes_nothing_is_dropped_and_the_rest_goes_on(serve, until):
    limits = SchedulerConfig(token_budget=64, max_running=4, page_size=64, num_pages=2000, max_length=100_000)
    running = serve(engine_limits=limits, limits={"write_seconds": 0.5})
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 90_000, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = running.url.removeprefix("http://").split(":")
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect((host, int(port)))
    link.sendall(head.encode() + body)
    until(lambda: running.service.models[0].running == 1)
    assert running.chat("«others»").json()["choices"][0]["message"]["content"] == "others"
    until(lambda: running.service.models[0].running == 0, seconds=30)
    until(lambda: running.engine.fake.idle)
    link.close()


def test_callers_share_fairly(serve, until):
    running = serve(engine_limits=ONE, keys=("a:key-of-ada-1", "b:key-of-bob-1"))
    running.engine.held.set()

    def ask(name, key):
        return running.client(headers={"authorization": f"Bearer {key}"}).post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": f"«{name}»"}], "max_tokens": 8}
        )

    first = later(ask, "a0", "key-of-ada-1")
    until(lambda: running.service.models[0].running == 1)
    many = []
    for n in range(1, 5):
        many.append(later(ask, f"a{n}", "key-of-ada-1"))
        until(lambda n=n: running.service.models[0].waiting == n)
    many.append(later(ask, "b", "key-of-bob-1"))
    until(lambda: running.service.models[0].waiting == 5)
    running.engine.held.clear()
    for result in (first, *many):
        assert result.result().status_code == 200
    salts = [request.cache_salt for request in running.engine.submitted]
    assert salts.index("key:b") <= 2, "who comes second with one request does not wait for all of the first one's"


def test_smaller_priorities_go_first(serve, until):
    running = serve(engine_limits=ONE)
    running.engine.held.set()
    waiting = [later(running.chat, "«0»")]
    until(lambda: running.service.models[0].running == 1)
    for n, priority in enumerate((5, 0, -5), 1):
        waiting.append(later(running.chat, "«x»", priority=priority))
        until(lambda n=n: running.service.models[0].waiting == n)
    running.engine.held.clear()
    for result in waiting:
        result.result()
    assert [request.priority for request in running.engine.submitted] == [0, -5, 0, 5]


def test_an_engine_that_dies_fails_what_ran_and_keeps_what_waited(serve, until):
    running = serve(engine_limits=ONE)
    dead = running.engine
    dead.held.set()
    ran = later(running.chat, "«ran»")
    until(lambda: running.service.models[0].running == 1)
    waited = later(running.chat, "«waited»")
    until(lambda: running.service.models[0].waiting == 1)
    running.loop.call_soon_threadsafe(dead.dies, "the engine process ended with code -9")
    assert ran.result().json()["error"]["code"] == "engine_error"
    assert waited.result().json()["choices"][0]["message"]["content"] == "waited"
    assert running.engine is not dead
    dead.fake.cancel(dead.submitted[0].id)


def test_while_a_model_loads_requests_are_told_to_come_back(serve, until):
    gate = threading.Event()

    async def slow():
        while not gate.is_set():
            await asyncio.sleep(0.01)

    running = serve(loads=slow)
    assert running.client().get("/health").status_code == 503
    assert running.client().get("/health/live").status_code == 200
    response = running.chat("«x»")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
    assert "retry-after" in response.headers
    gate.set()
    until(lambda: running.client().get("/health/ready").status_code == 200)
    assert running.chat("«x»").status_code == 200


def test_draining_lets_what_runs_finish_and_refuses_the_new(running, until):
    running.engine.held.set()
    ran = later(running.chat, "«ran»")
    until(lambda: running.service.models[0].running == 1)
    drained = asyncio.run_coroutine_threadsafe(running.service.drain(10), running.loop)
    until(lambda: running.service.draining)
    assert running.chat("«new»").json()["error"]["code"] == "shutting_down"
    assert running.client().get("/health/ready").status_code == 503
    assert running.client().get("/health/live").status_code == 200
    running.engine.held.clear()
    drained.result(10)
    assert ran.result().json()["choices"][0]["message"]["content"] == "ran"


def test_mixed_load_with_clients_that_leave_loses_nothing(running, until):
    import random

    random.seed(1)

    def one(n):
        stream = n % 2 == 0
        seconds = random.choice([0.01, 5, 5])
        try:
            return (
                running.client()
                .post(
                    "/v1/chat/completions",
                    json={
                        "messages": [{"role": "user", "content": "x" * random.randint(1, 60)}],
                        "max_tokens": random.randint(1, 60),
                        "stream": stream,
                    },
                    timeout=seconds,
                )
                .status_code
            )
        except Exception as error:  # noqa: BLE001
            return type(error).__name__

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(40)))
    assert {status for status in results if isinstance(status, int)} == {200}
    until(lambda: running.engine.fake.idle)
    running.engine.fake.verify()
    assert running.engine.fake.load.free_pages == running.engine.limits.num_pages
    assert running.service.models[0].busy == 0
    until(lambda: running.service.live == {})
    assert running.log("error") == []
