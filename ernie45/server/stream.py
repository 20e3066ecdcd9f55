"""Server-sent events: one at a time as the client takes them, a comment when it is quiet, an end as soon as the client is gone."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie45.server.failures import Failure

T = TypeVar("T")
_COMMENT = b": keep-alive\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event. data: a text as it is, or a JSON value."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """An ASGI response that sends events.

    events     bytes to send; a `Failure` it raises is sent by `on_failure`, and ends the stream
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
    ) -> None:
        super().__init__()
        self._events = events
        self._on_failure = on_failure
        self._on_end = on_end
        self._sent_headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **headers,
        }
        self._keep_alive = keep_alive
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end, the client is gone, or it takes nothing for too long."""
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait([writing, watching], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, watching):
                task.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)
            self._on_end()
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _write(self, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._sent_headers.items()]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(TimeoutError, OSError):  # a client that takes nothing is left
            async for data in self._quietly():
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _quietly(self) -> AsyncIterator[bytes]:
        """The events, with comments between those that are far apart."""
        events = self._events.__aiter__()
        while True:
            coming = asyncio.ensure_future(anext(events))
            try:
                while not coming.done():
                    await asyncio.wait([coming], timeout=self._keep_alive)
                    if not coming.done():
                        yield _COMMENT
                yield coming.result()
            except StopAsyncIteration:
                return
            except Failure as failure:
                yield self._on_failure(failure)
                return
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)

    async def _send(self, send: Send, message: Any) -> None:
        async with asyncio.timeout(self._write_seconds):
            await send(message)


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
