"""Streams that are taken up again: not an event lost, none twice; and an answer that nobody comes back for ends."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.server.access import Caller
from ernie45.server.failures import Failure
from ernie45.server.resume import HeldStream, Streams, wished_seconds
from ernie45.server.settings import Limits

ME, OTHER = Caller("me", owner="me"), Caller("other", owner="other")
ASK = {"messages": [{"role": "user", "content": "«one two three four five six»"}], "stream": True}


class Source:
    """Events on demand, and a record of how far it was asked and how often it was ended."""

    def __init__(self, count, size=1, failure=None):
        self.count, self.size, self.failure = count, size, failure
        self.given, self.ended, self.gone = 0, 0, 0

    async def events(self):
        for n in range(1, self.count + 1):
            self.given = n
            yield b"data: " + str(n).encode() * self.size + b"\n\n"
            await asyncio.sleep(0)
        if self.failure:
            raise self.failure

    def hold(self, seconds=5.0, room=1 << 20):
        def ended():
            self.ended += 1

        def gone(held):
            self.gone += 1

        return HeldStream("s", ME, seconds, room, self.events(), lambda failure: b"data: " + str(failure).encode() + b"\n\n", ended, gone)


async def take(held, after, count=None):
    """(number, event) of at most `count` events."""
    taken = []
    stream = held.follow(after)
    async for data in stream:
        head, _, rest = data.partition(b"\n")
        taken.append((int(head.rpartition(b":")[2]), rest))
        if len(taken) == count:
            break
    await stream.aclose()
    return taken


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(20, 200), st.integers(1, 3))
def test_however_often_it_breaks_off_every_event_comes_once(cuts, room, size):
    async def run():
        source = Source(20, size)
        held, seen = source.hold(room=room), []
        for cut in cuts:
            seen += await take(held, len(seen), cut)
        seen += await take(held, len(seen))
        assert [number for number, _ in seen] == list(range(1, 21))
        assert [data for _, data in seen] == [b"data: " + str(n).encode() * size + b"\n\n" for n in range(1, 21)]
        assert source.ended == 1
        held.close()
        assert source.gone == 1

    asyncio.run(run())


def test_an_answer_that_nobody_reads_waits_and_ends():
    async def run():
        source = Source(1000, size=10)
        held = source.hold(seconds=0.2, room=200)
        await asyncio.sleep(0.1)
        assert source.given < 20  # the room was full long before the end
        assert source.ended == 0
        await asyncio.sleep(0.3)
        assert (source.ended, source.gone) == (1, 1)
        await asyncio.gather(held._writing, return_exceptions=True)

    asyncio.run(run())


def test_who_comes_later_takes_over_and_what_is_gone_is_said_to_be_gone():
    async def run():
        source = Source(50, size=10)
        held = source.hold(room=300)
        first = held.follow(0)
        assert (await anext(first)).startswith(b"id: s:1\n")
        taken = await take(held, 1, 30)
        assert [number for number, _ in taken] == list(range(2, 32))
        assert [data async for data in first] == []  # the one before has ended
        with pytest.raises(Failure) as gone:
            held.check(1)
        assert (gone.value.status, gone.value.code) == (410, "events_gone")
        with pytest.raises(Failure) as never:
            held.check(10_000)
        assert never.value.status == 400
        held.close()
        await asyncio.gather(held._writing, return_exceptions=True)

    asyncio.run(run())


def test_a_failure_is_the_last_event():
    async def run():
        source = Source(2, failure=Failure(500, "it broke"))
        held = source.hold()
        assert [data for _, data in await take(held, 0)][-1] == b"data: it broke\n\n"
        held.close()

    asyncio.run(run())


def test_streams_are_bounded_and_belong_to_who_asked():
    async def run():
        streams, source = Streams(Limits(resumable=1)), Source(3)
        asked = {"x-resume-seconds": "5"}
        end = lambda: None  # noqa: E731
        assert streams.hold({}, ME, source.events(), lambda f: b"", end) is None
        held = streams.hold(asked, ME, source.events(), lambda f: b"", end)
        assert streams.hold(asked, ME, source.events(), lambda f: b"", end) is None  # as many as may be
        assert streams.find(f"{held.id}:0", ME) == (held, 0)
        for text, caller, status in (
            (None, ME, 400),
            ("x", ME, 400),
            (f"{held.id}:-1", ME, 400),
            (f"{held.id}:0", OTHER, 404),
            ("a:1", ME, 404),
        ):
            with pytest.raises(Failure) as refused:
                streams.find(text, caller)
            assert refused.value.status == status
        streams.close()
        await asyncio.gather(held._writing, return_exceptions=True)
        with pytest.raises(Failure):
            streams.find(f"{held.id}:0", ME)

    asyncio.run(run())


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf"])
def test_nonsense_seconds_are_refused(text):
    with pytest.raises(Failure, match="must be a number of seconds"):
        wished_seconds(text, 60)


def parts(text):
    """The events of a stream's text: (id, data)."""
    blocks = [block for block in text.split("\n\n") if block.startswith("id: ")]
    return [tuple(line.partition(": ")[2] for line in block.split("\n")) for block in blocks]


def strip(events):
    """What events say, without what differs between two answers to the same question."""
    return [data.partition('"choices"')[2] for _, data in events]


def test_a_lost_connection_is_taken_up_over_http(running):
    client = running.client()
    whole = parts(client.post("/v1/chat/completions", json=ASK, headers={"X-Resume-Seconds": "30"}).text)
    assert whole[-1][1] == "[DONE]"
    running.engine.held.set()
    with client.stream("POST", "/v1/chat/completions", json=ASK, headers={"X-Resume-Seconds": "30"}) as response:
        lines = response.iter_lines()
        running.engine.held.clear()
        got, id = [], ""
        for line in lines:
            if line.startswith("id: "):
                id = line.removeprefix("id: ")
            if line.startswith("data: "):
                got.append((id, line.removeprefix("data: ")))
            if len(got) == 3:
                break
    rest = parts(client.get("/v1/streams", headers={"Last-Event-ID": id}).text)
    assert strip(got + rest) == strip(whole)
    assert client.get("/v1/streams", headers={"Last-Event-ID": rest[-1][0]}).text == ""  # it is all there


def test_without_the_header_an_answer_ends_with_its_connection(running):
    client = running.client()
    running.engine.held.set()
    with client.stream("POST", "/v1/chat/completions", json=ASK) as response:
        assert "x-stream-id" not in response.headers
    end = time.monotonic() + 30
    while not running.engine.fake.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert running.engine.fake.idle
    answer = client.get("/v1/streams", headers={"Last-Event-ID": "stream_x:1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")


def test_a_bad_header_costs_a_400_and_leaves_nothing(running):
    answer = running.post("/v1/chat/completions", ASK, headers={"X-Resume-Seconds": "soon"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Resume-Seconds"
    assert not running.service.live
