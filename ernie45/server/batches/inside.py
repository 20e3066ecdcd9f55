"""A request to a route of this server from within: the same checks, answers and errors as over HTTP, without a socket."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from ernie45.server.access import Caller


@dataclass(frozen=True)
class Inside:
    """An answer: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


async def ask(app: ASGIApp, path: str, body: bytes, caller: Caller, request_id: str) -> Inside:
    """Sends a body to a route behind the door, as this caller. Cancelling it is the client going away."""
    sent: list[Message] = []
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()  # a client that stays
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {"caller": caller, "request_id": request_id, "told": {}},
    }
    await app(scope, receive, send)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    data = b"".join(message.get("body", b"") for message in sent[1:])
    return Inside(sent[0]["status"], headers, json.loads(data))
