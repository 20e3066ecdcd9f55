"""Streams that can be taken up again: a client that asked for it may lose its connection and read on after the last event it got.

It asks with the header `X-Resume-Seconds`, for how long the answer may go on unread. Each event then carries an id; `GET /v1/streams` with
that id as `Last-Event-ID` gives what came after it. Without the header an answer ends with its connection, as everyone expects.
"""

import asyncio
import contextlib
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

from ernie45.server.access import Caller
from ernie45.server.failures import Failure, bad
from ernie45.server.settings import Limits

HEADER = "x-resume-seconds"


class HeldStream:
    """One answer's newest events, and the one reader it has, if any.

    The answer is written as long as there is room for what nobody has read; then it waits, as it does for any slow reader.
    """

    def __init__(
        self,
        id: str,
        caller: Caller,
        seconds: float,
        room: int,
        events: AsyncIterator[bytes],
        on_failure: Callable[[Failure], bytes],
        on_end: Callable[[], None],
        on_gone: Callable[["HeldStream"], None],
    ) -> None:
        """seconds: how long it is kept unread. room: bytes kept. on_end: when the answer is over. on_gone: when nothing is kept."""
        self.id, self.caller = id, caller
        self._seconds, self._room = seconds, room
        self._kept: deque[bytes] = deque()
        self._first = 1  # number of the oldest event kept; the first event is 1
        self._size = 0
        self._read = 0  # the newest number that its present, or last, reader has taken
        self._reader: object | None = None
        self._moved = asyncio.Event()  # something was written, read, or a reader came or went
        self._on_end, self._on_gone = on_end, on_gone
        self._writing = asyncio.ensure_future(self._write(events, on_failure))
        self._writing.add_done_callback(lambda task: self._moved.set())
        self._expiry = self._count_down()

    @property
    def _newest(self) -> int:
        return self._first + len(self._kept) - 1

    async def _write(self, events: AsyncIterator[bytes], on_failure: Callable[[Failure], bytes]) -> None:
        try:
            try:
                async for data in events:
                    await self._keep(data)
            except Failure as failure:
                await self._keep(on_failure(failure))
        finally:
            self._on_end()
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    async def _keep(self, data: bytes) -> None:
        while self._size + len(data) > self._room and self._kept:
            if self._first <= self._read:  # someone has it: the oldest goes
                self._size -= len(self._kept.popleft())
                self._first += 1
            else:
                await self._wait()
        self._kept.append(f"id: {self.id}:{self._newest + 1}\n".encode() + data)
        self._size += len(self._kept[-1])
        self._moved.set()

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def check(self, after: int) -> None:
        """Raises `Failure` 410 when what came after event number `after` is no longer kept, 400 for a number that never was."""
        if after > self._newest:
            raise bad(f"this stream has no event {after} yet", "Last-Event-ID")
        if after < self._first - 1:
            text = f"the events after {after} are no longer kept; the oldest is {self._first}"
            raise Failure(410, text, field="Last-Event-ID", code="events_gone")

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """The events after number `after`, to the end. Who follows takes the stream over from whoever read it before."""
        me = self._reader = object()
        self._read = after
        self._stop_count()
        self._moved.set()
        try:
            at = after
            while self._reader is me:
                if at < self._newest:
                    at += 1
                    assert at >= self._first, "what its reader has not read is never dropped"
                    data = self._kept[at - self._first]
                    self._read = at
                    self._moved.set()
                    yield data
                elif self._writing.done():
                    if not self._writing.cancelled():
                        self._writing.result()  # what broke the answer breaks the stream: it must not look like an end
                    return
                else:
                    await self._wait()
        finally:
            if self._reader is me:
                self._reader = None
                self._expiry = self._count_down()

    def _count_down(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._seconds, self.close)

    def _stop_count(self) -> None:
        self._expiry.cancel()

    def close(self) -> None:
        """Nobody came back in time, or the server ends: the answer stops, and nothing is kept."""
        self._stop_count()
        self._writing.cancel()
        self._on_gone(self)


class Streams:
    """The streams that can be taken up again, by id."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[str, HeldStream] = {}

    def hold(
        self,
        headers: Mapping[str, str],
        caller: Caller,
        events: AsyncIterator[bytes],
        on_failure: Callable[[Failure], bytes],
        on_end: Callable[[], None],
    ) -> HeldStream | None:
        """A stream for a client that asked for it; None when it did not, or when as many are held as may be."""
        if HEADER not in headers or len(self._held) >= self._limits.resumable:
            return None
        seconds = wished_seconds(headers[HEADER], self._limits.resume_seconds)
        id = f"stream_{secrets.token_hex(12)}"
        held = HeldStream(id, caller, seconds, self._limits.resume_bytes, events, on_failure, on_end, self._forget)
        self._held[id] = held
        return held

    def _forget(self, held: HeldStream) -> None:
        self._held.pop(held.id, None)

    def find(self, last_event_id: str | None, caller: Caller) -> tuple[HeldStream, int]:
        """The stream and event number of an id. Raises `Failure`: 400, 404 (nobody learns of another key's streams), 410."""
        if last_event_id is None:
            raise bad("send the id of the last event you got as the header Last-Event-ID", "Last-Event-ID")
        id, _, number = last_event_id.rpartition(":")
        if not (id and number.isascii() and number.isdigit() and len(number) < 10):
            raise bad(f"'{last_event_id[:80]}' is no id of an event; it ends in a colon and a number", "Last-Event-ID")
        held = self._held.get(id)
        if held is None or held.caller.owner != caller.owner:
            raise Failure(404, "there is no such stream, or it is no longer kept", field="Last-Event-ID", code="stream_not_found")
        held.check(int(number))
        return held, int(number)

    def close(self) -> None:
        """Ends all of them."""
        for held in list(self._held.values()):
            held.close()


def wished_seconds(text: str, most: float) -> float:
    """The seconds a header asks for, at most `most`. Raises `Failure` 400 for what is no number above 0."""
    seconds = math.nan
    with contextlib.suppress(ValueError):
        seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise bad(f"X-Resume-Seconds must be a number of seconds above 0, not '{text[:40]}'", "X-Resume-Seconds")
    return min(seconds, most)
