"""The application: routes over a service, behind the door."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from ernie45.server.access import Caller, Keys
from ernie45.server.anthropic_routes import add_anthropic
from ernie45.server.batches.routes import add_batches
from ernie45.server.batches.runner import Runner
from ernie45.server.batches.storage import Storage
from ernie45.server.door import Door, failed
from ernie45.server.failures import Failure, broken, reason_of
from ernie45.server.health import add_health
from ernie45.server.openai_routes import add_openai
from ernie45.server.pages import router as pages
from ernie45.server.responses_routes import add_responses
from ernie45.server.service import Service
from ernie45.server.text_routes import add_text

Adder = Callable[[FastAPI, Service], None]
PARTS: tuple[Adder, ...] = (add_health, add_openai, add_text, add_anthropic, add_responses)
"""Every group of routes there is, beside the pages and the batches."""


def make_app(service: Service, keys: Keys, storage: Storage | Failure) -> ASGIApp:
    """The whole server as one ASGI application; it closes all models and the storage when it ends.

    storage: of files and batches, or what is answered in its place.
    """

    def behind(owner: str) -> Caller | None:
        caller = keys.owning(owner)
        return None if caller is None else replace(caller, background=True)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        idle = service.settings.idle_seconds
        lasting = [] if idle is None else [asyncio.ensure_future(service.unload_idle(idle))]
        if runner is not None:
            lasting.append(asyncio.ensure_future(runner.run()))
        yield
        for task in lasting:
            task.cancel()
        await asyncio.gather(*lasting, return_exceptions=True)
        await service.close()
        if isinstance(storage, Storage):
            storage.close()

    app = FastAPI(
        title="ernie45",
        version=service.version,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    for add in PARTS:
        add(app, service)
    runner = Runner(service, app, storage, behind) if isinstance(storage, Storage) else None
    app.state.runner = runner
    add_batches(app, service, storage, runner)
    app.routes.extend(pages().routes)

    @app.exception_handler(Failure)
    async def on_failure(request: Request, failure: Failure) -> Response:
        return _Sent(failure)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        text = {404: f"there is no route {request.url.path[:200]}", 405: f"this route does not take {request.method}"}
        return _Sent(Failure(error.status_code, text.get(error.status_code, reason_of(error.status_code)), headers=error.headers))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return _Sent(broken(request.state.request_id))  # the door, to which the exception goes on, writes the log

    return Door(app, service, keys)


class _Sent(Response):
    """A failure as a response."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(status_code=failure.status)
        self._failure = failure

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await failed(self._failure, scope, receive, send)


def routes_of(app: ASGIApp) -> list[BaseRoute]:
    """Every route behind a door, for tests that walk them."""
    assert isinstance(app, Door)
    inner = app.inner
    assert isinstance(inner, FastAPI)
    return inner.routes
