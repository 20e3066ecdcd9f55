"""How events get out: written into a mould, and past the HTTP library where the protocol allows it. The bytes are those of the long way."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from ernie45.engine.scheduler import Load, SchedulerConfig
from ernie45.engine.wire import Stepped
from ernie45.server import listener, merge
from ernie45.server.metrics import _EACH, Metrics
from ernie45.server.model import Step
from ernie45.server.stream import Mould, event

ASK = {"prompt": "«one two three»", "stream": True, "max_tokens": 30}


@given(st.text(), st.text(), st.none() | st.just("delta"))
def test_a_mould_gives_what_writing_the_event_anew_gives(text, around, name):
    def shape(hole):
        return {"around": around, "text": hole, "deep": [{"again": hole}, None], "last": around}

    assert Mould(shape, name).fill(text) == event(shape(text), name)


def ask(version, *bodies):
    head = "POST /v1/completions HTTP/{}\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{}\r\n"
    sent = b""
    for number, body in enumerate(bodies, 1):
        data = json.dumps(body).encode()
        last = "connection: close\r\n" if number == len(bodies) else ""
        sent += head.format(version, len(data), last).encode() + data
    return sent


def read(running, sent):
    """All that a server says until it hangs up."""
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(sent)
        data = b""
        while piece := link.recv(1 << 16):
            data += piece
    return data


def unframed(data):
    """(head, body, rest) of the first response: HTTP/1.1's chunks put together, to the letter of RFC 9112 section 7.1."""
    head, _, rest = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        body, end, rest = body + rest[:count], rest[count : count + 2], rest[count + 2 :]
        assert end == b"\r\n"
        if not count:
            return head, body, rest


def said(body, events):
    *chunks, done = events(body.decode())
    assert done == "[DONE]"
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_requests_of_one_connection_one_behind_the_other_and_sent_at_once(running, events, monkeypatch):
    """The first is written the short way. Those that came with it are begun by the HTTP library later, and take the long one."""
    short, write = [], listener._Chunks.write
    monkeypatch.setattr(listener._Chunks, "write", lambda chunks, data: (short.append(data), write(chunks, data)))
    rest, found = read(running, ask("1.1", ASK, ASK, ASK)), []
    for _ in range(3):
        head, body, rest = unframed(rest)
        assert head.startswith(b"HTTP/1.1 200")
        found.append(said(body, events))
        assert len(found) > 1 or (short and body.endswith(b"".join(short)))
    assert found == ["one two three"] * 3
    assert rest == b""


def test_a_client_of_http_1_0_gets_no_chunks(running, events):
    head, _, body = read(running, ask("1.0", ASK)).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert said(body, events) == "one two three"


def test_who_reads_in_fits_gets_everything_in_its_order(serve, events, until, monkeypatch):
    """While the client takes what comes, pieces go to it as they come; while it does not, they wait for it."""
    hurried, hurry = [], merge._hurry
    monkeypatch.setattr(merge, "_hurry", lambda *about: hurried.append(hurry(*about)) or hurried[-1])
    running = serve(engine_limits=SchedulerConfig(token_budget=64, max_running=4, page_size=64, num_pages=400, max_length=2000))
    asked = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "seed": 3, "logprobs": 5, "return_token_ids": True}
    (listening,) = running.server.servers[0].sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it: little is between the two
    whole = running.post("/v1/completions", asked).json()["choices"][0]
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        link.sendall(ask("1.1", asked | {"stream": True}))
        until(lambda: hurried and not hurried[-1])
        data = bytearray()
        while piece := link.recv(1 << 16):
            data += piece
    _, body, _ = unframed(bytes(data))
    chunks = events(body.decode())[:-1]
    assert [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])] == whole["token_ids"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert len(set(hurried)) == 2, "both ways were taken"


@given(st.lists(st.dictionaries(st.floats(0, 10, allow_nan=False), st.integers(1, 9), max_size=3), max_size=5))
def test_gaps_are_counted_as_the_client_library_counts_them(steps):
    metrics, registry = Metrics(), CollectorRegistry()
    metrics.watch([])
    name, what = "vllm:inter_token_latency_seconds", "Seconds between a token of an answer and the one before."
    reference = Histogram(name, what, ["model_name"], buckets=_EACH, registry=registry)
    load = Load(*[0] * 9)
    for gaps in steps:
        metrics.stepped("m", Step(Stepped((), load, 0.0), 1.0, sum(gaps.values()), 0, gaps))
        for gap, count in gaps.items():
            for _ in range(count):
                reference.labels("m").observe(gap)
    ours = values(metrics.text().decode(), name)
    wanted = values(generate_latest(registry).decode(), name)
    assert ours.keys() == wanted.keys()
    assert ours == pytest.approx(wanted, rel=1e-9)  # the order of adding differs


def values(page, name):
    lines = [line for line in page.splitlines() if line.startswith(name) and "_created" not in line]
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines)}
