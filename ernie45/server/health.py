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
        """200 when a model answers; 503 while the first one loads, when it is down, and while the server shuts down."""
        first = service.models[0]
        if service.draining:
            return JSONResponse({"status": "shutting down"}, 503, headers={"Retry-After": "5"})
        if not any(model.state == "ready" for model in service.models):
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
        models = [_status(model) for model in service.models]
        body = {"version": service.version, "draining": service.draining, "uptime_seconds": service.now() - service.began}
        return JSONResponse(body | _whole(service) | {"models": models})


def _whole(service: Service) -> dict[str, Any]:
    """All models together, as the page of the server's state reads it; the experts are those of the first model that has any."""
    loads = [model.load for model in service.models if model.load is not None]
    infos = [model.info for model in service.models if model.info is not None]
    now, recent = service.now(), service.metrics.recent
    written = sum(model.written for model in service.models)
    prompts = sum(load.prompt_tokens for load in loads)
    pages = sum(load.num_pages for load in loads)
    whole: dict[str, Any] = {
        "queue": {
            "running": sum(model.running for model in service.models),
            "waiting": sum(model.waiting for model in service.models),
            "max_running": sum(info.limits.max_running for info in infos),
            "max_waiting": service.settings.limits.queue,
        },
        "throughput": recent.rates(now),
        "history": recent.history(now),
        "latency": recent.latency(now),
        "totals": recent.totals
        | {
            "prompt_tokens": prompts,
            "generated_tokens": written,
            "preemptions": sum(load.preemptions for load in loads),
        },
        "cache": {
            "pages_total": pages,
            "pages_used": pages - sum(load.free_pages for load in loads),
            "pages_reusable": sum(load.kept_pages for load in loads),
            "page_size": infos[0].limits.page_size if infos else None,
            "prefix_hit_rate": sum(load.cached_tokens for load in loads) / prompts if prompts else None,
        },
    }
    if any(info.memory for info in infos):
        plans = [info.memory for info in infos]
        cache = sum(plan.get("cache", 0) for plan in plans)
        weights = sum(plan.get("weights", 0) + plan.get("mapped weights", 0) for plan in plans)
        whole["memory"] = {"weights_bytes": weights, "cache_bytes": cache}
    experts = next((model.experts for model in service.models if model.experts), ())
    if experts:
        whole["experts"] = {
            "layers": [{"layer": bank.layer, "load": list(bank.counts)} | ({"bank": "vision"} if bank.vision else {}) for bank in experts]
        }
    return whole


def _status(model: ServedModel) -> dict[str, Any]:
    load, info = model.load, model.info
    stage, done, total = model.progress
    return {
        "id": model.name,
        "name": model.name,
        "names": list(model.names),
        "state": model.state,
        "loading": {"stage": stage, "done": done, "total": total} if model.state == "loading" else None,
        "memory": model.granted or None,
        "settings": info.settings if info else {},
        "parameters": info.parameters if info else None,
        "active_parameters": info.active_parameters if info else None,
        "dtype": info.dtype if info else None,
        "threads": info.threads if info else None,
        "cores": list(info.cpus) if info else [],
        "plan": info.memory if info else {},
        "context": info.limits.max_length if info else None,
        "running": model.running,
        "waiting": model.waiting,
        "pages": {"free": load.free_pages, "all": load.num_pages} if load else None,
        "preemptions": load.preemptions if load else 0,
        "prompt_tokens": load.prompt_tokens if load else 0,
        "cached_tokens": load.cached_tokens if load else 0,
    }
