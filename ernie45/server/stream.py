"""Server-sent events: one at a time as the client takes them, a comment when it is quiet, an end as soon as the client is gone."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from json.encoder import encode_basestring
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie45.server.failures import Failure

T = TypeVar("T")
_COMMENT = b": keep-alive\n\n"
_HOLE = secrets.token_hex(16)  # stands for the text that a mould is filled with; nobody who names a model or a request can write it
CHUNKS = "ernie45.chunks"
"""The extension of a request's scope under which a listener offers `Chunks`."""

_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event. data: a text as it is, or a JSON value."""
    text = data if isinstance(data, str) else _as_json(data)
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


class Mould:
    """Events that differ in one text alone: what is the same in all of them is written once."""

    def __init__(self, shape: Callable[[str], Any], name: str | None = None) -> None:
        """shape: the event's JSON value around a text, which it may hold in several places."""
        self._parts = event(shape(_HOLE), name).split(_as_json(_HOLE).encode())

    def fill(self, text: str) -> bytes:
        """The event with this text."""
        return encode_basestring(text).encode().join(self._parts)


class Chunks(Protocol):
    """A short way to the client for parts of a body, past middleware and the HTTP library: both only look at how an answer begins and ends.

    ready   whether the client takes what is written; where it does not, the long way, `send`, waits for it
    """

    @property
    def ready(self) -> bool: ...
    def write(self, data: bytes) -> None: ...


class Outlet:
    """The short way to a stream's client, for whoever has something while the stream itself waits for more: nobody need be woken for it.

    used    when something was written here, on the clock of `time.monotonic`
    """

    def __init__(self) -> None:
        self.used = 0.0
        self._chunks: Chunks | None = None

    def open(self, chunks: Chunks | None) -> None:
        """The stream has begun: from now on this way may be taken, where there is one."""
        self._chunks = chunks

    @property
    def ready(self) -> bool:
        """Whether it is open, and the client takes what is written."""
        return self._chunks is not None and self._chunks.ready

    def write(self, data: bytes) -> None:
        """Sends events; only while it is ready."""
        assert self._chunks is not None
        self._chunks.write(data)
        self.used = time.monotonic()


class EventStream(Response):
    """An ASGI response that sends events.

    events     bytes to send; a `Failure` it raises is sent by `on_failure`, and ends the stream
    outlet     a way past `events`, which is opened when the stream has begun
    on_end     called exactly once, however it ends: there the answers are cancelled
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_failure: Callable[[Failure], bytes],
        on_end: Callable[[], None],
        headers: Mapping[str, str],
        keep_alive: float,
        write_seconds: float,
        outlet: Outlet | None = None,
    ) -> None:
        super().__init__()
        self._events = events
        self._outlet = outlet or Outlet()
        self._on_failure = on_failure
        self._on_end = on_end
        sent = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no", **headers}
        self._head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
        self._begun = False  # the head goes out with the first event or comment
        self._keep_alive = keep_alive
        self._write_seconds = write_seconds
        self._turn = asyncio.Lock()  # events and comments are sent one at a time
        self._sending: float | None = None  # since when the client has not taken what is being sent
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end, the client is gone, or it takes nothing for too long."""
        self._sent = time.monotonic()
        chunks: Chunks | None = scope.get("extensions", {}).get(CHUNKS)
        writing, *others = tasks = [asyncio.ensure_future(work) for work in (self._write(send, chunks), _gone(receive), self._watch(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(writing, *others, return_exceptions=True)
            self._on_end()
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _write(self, send: Send, chunks: Chunks | None) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            try:
                async for data in self._events:
                    if self._outlet.ready:
                        self._outlet.write(data)
                        continue
                    await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
                    self._outlet.open(chunks)
            except Failure as failure:
                if not self._begun:
                    raise  # nothing was said yet: it is an answer with a status of its own
                await self._send(send, {"type": "http.response.body", "body": self._on_failure(failure), "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, send: Send) -> None:
        """Sends comments while it is quiet; ends when the client has taken nothing for too long. One timer for all events of a stream."""
        comment = {"type": "http.response.body", "body": _COMMENT, "more_body": True}
        while True:
            if self._sending is not None:
                left = self._sending + self._write_seconds - time.monotonic()
                if left <= 0:
                    return
            else:
                left = max(self._sent, self._outlet.used) + self._keep_alive - time.monotonic()
                if left <= 0:
                    try:
                        async with asyncio.timeout(self._write_seconds):
                            await self._send(send, comment)
                    except OSError:  # the client is gone, or it takes nothing: a TimeoutError is one too
                        return
                    continue
            await asyncio.sleep(min(left, self._write_seconds))

    async def _send(self, send: Send, message: Any) -> None:
        async with self._turn:
            self._sending = time.monotonic()
            try:
                if not self._begun:
                    self._begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self._head})
                await send(message)
            finally:
                self._sending, self._sent = None, time.monotonic()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; when the client goes away first, the work is cancelled and `Failure` 499 raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Failure(499, "the client went away", code="client_gone")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
