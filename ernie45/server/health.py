"""Routes about the server itself: alive, ready, busy."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from ernie45.server.metrics import CONTENT_TYPE
from ernie45.server.model import ServedModel
from ernie45.server.service import Service


def add_health(app: FastAPI, service: Service) -> None:
    """GET /health, /health/live, /health/ready, /metrics, /status.json, /version."""

    @app.get("/health/live", tags=["server"])
    async def live() -> JSONResponse:
        """The process runs. Needs no key."""
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", tags=["server"])
    @app.get("/health", tags=["server"])
    async def ready() -> JSONResponse:
        """200 when the first model answers; 503 while it loads, when it is down, and while the server shuts down."""
        first = service.models[0]
        if service.draining:
            return JSONResponse({"status": "shutting down"}, 503, headers={"Retry-After": "5"})
        if first.state != "ready":
            return JSONResponse({"status": first.state}, 503, headers={"Retry-After": "5"})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version", tags=["server"])
    async def version() -> JSONResponse:
        """The version of the program."""
        return JSONResponse({"version": service.version})

    @app.get("/status.json", tags=["server"])
    async def status() -> JSONResponse:
        """How busy each model is, for people and pages."""
        return JSONResponse(
            {"version": service.version, "draining": service.draining, "models": [_status(model) for model in service.models]}
        )


def _status(model: ServedModel) -> dict[str, Any]:
    load, info = model.load, model.info
    stage, done, total = model.progress
    return {
        "name": model.name,
        "names": list(model.names),
        "state": model.state,
        "loading": {"stage": stage, "done": done, "total": total} if model.state == "loading" else None,
        "settings": info.settings if info else {},
        "context": info.limits.max_length if info else None,
        "running": model.running,
        "waiting": model.waiting,
        "pages": {"free": load.free_pages, "all": load.num_pages} if load else None,
        "preemptions": load.preemptions if load else 0,
        "prompt_tokens": load.prompt_tokens if load else 0,
        "cached_tokens": load.cached_tokens if load else 0,
    }
