"""The door of the server, before every route: who may come in, what host they asked for, one id and one log line per request.

Closed by default: a route is open only if it stands in `OPEN` or is a file of the web page, which holds no secret. Whatever goes wrong
behind it leaves as an error of the protocol.
"""

import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie45.server.access import ANONYMOUS, Caller, Keys, host_name
from ernie45.server.failures import Failure, broken
from ernie45.server.pages import is_public
from ernie45.server.service import Service

OPEN = frozenset({"/health/live"})
"""Routes that need no key."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ANTHROPIC = "/v1/messages"
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


class Door:
    """An ASGI middleware. state of a request's scope: `caller`, `request_id`, and `told`, what its log line is to say beside."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._open = OPEN | ({"/metrics"} if service.settings.open_metrics else set())
        self._hosts = service.settings.hosts()
        self._origins = frozenset(service.settings.cors_origins)

    @property
    def inner(self) -> ASGIApp:
        """What is behind the door."""
        return self._app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        told: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, told=told, caller=ANONYMOUS)
        began, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in self._extra(scope, request_id, headers) if name not in sent]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and headers.get("origin") in self._origins:
                await Response(status_code=204)(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except Failure as failure:
            if not status:
                await failed(failure, scope, receive, watched)
        except Exception as error:  # noqa: BLE001  the last stop: the caller gets an id, the log gets the rest
            self._service.journal.note("error", id=request_id, error=type(error).__name__, where=_where(error))
            if not status:
                await failed(broken(request_id), scope, receive, watched)
        finally:
            route = _route(scope)
            self._service.metrics.answered(route, status)
            told |= {"caller": scope["state"]["caller"].name}
            milliseconds = round((time.perf_counter() - began) * 1000, 1)
            self._service.journal.note(
                "request", id=request_id, method=scope["method"], route=route, status=status, ms=milliseconds, **told
            )

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises `Failure`: 400 or 403 for a host or origin that may not, 401 without a key."""
        host = headers.get("host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            raise Failure(403, "this host name is not one of the server's; --allowed-hosts names more", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin.partition("://")[2] != host:
            raise Failure(
                403, "pages of this origin may not use the server; --cors-origins names those that may", code="origin_not_allowed"
            )
        if self._keys and scope["path"] not in self._open and not is_public(scope["path"]) and scope["method"] != "OPTIONS":
            scope["state"]["caller"] = self._keys.caller(headers)

    def _extra(self, scope: Scope, request_id: str, headers: Headers) -> list[tuple[bytes, bytes]]:
        caller: Caller = scope["state"]["caller"]
        extra: dict[str, str] = {"x-request-id": request_id, **SECURITY_HEADERS}
        if scope["path"].startswith(_ANTHROPIC):
            extra["request-id"] = request_id
        if scope["path"].startswith("/v1/"):
            extra |= self._service.rates.headers(caller, self._service.now())
        origin = headers.get("origin")
        if origin in self._origins and origin is not None:
            extra |= {"access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": "x-request-id, retry-after"}
            if scope["method"] == "OPTIONS":
                extra |= {
                    "access-control-allow-methods": "GET, POST, DELETE",
                    "access-control-allow-headers": "authorization, content-type, x-api-key, x-request-id, anthropic-version",
                    "access-control-max-age": "600",
                }
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]


async def failed(failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a failure in the shape of the protocol that was spoken."""
    request_id = scope["state"]["request_id"]
    scope["state"]["told"].update(code=failure.code or failure.kind, param=failure.field)
    body = failure.anthropic(request_id) if scope["path"].startswith(_ANTHROPIC) else failure.openai()
    await JSONResponse(body, failure.status, headers=failure.headers)(scope, receive, send)


def _route(scope: Scope) -> str:
    """The route's pattern: paths are of the caller's making and would fill logs and metrics."""
    return getattr(scope.get("route"), "path", "unknown")


def _where(error: BaseException) -> str:
    """The line of ours that an exception came through last; never its text, which may quote a prompt."""
    trace, place = error.__traceback__, "unknown"
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("ernie45"):
            place = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
