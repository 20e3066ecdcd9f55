"""A service from settings: models with their names and engines, keys, metrics, the application."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from ernie45.config import Environment
from ernie45.engine.process import EngineProcess
from ernie45.engine.spawn import Spawned
from ernie45.engine.wire import EngineSpec
from ernie45.machine import allowed_cpus
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.server.access import read_keys
from ernie45.server.app import make_app
from ernie45.server.batches.storage import open_storage
from ernie45.server.journal import Journal
from ernie45.server.metrics import Metrics
from ernie45.server.model import Engine, Observer, Opener, ServedModel
from ernie45.server.service import Service
from ernie45.server.settings import ServerSettings
from ernie45.server.telemetry import Telemetry, otlp_exporter


def build(
    sources: Sequence[str],
    settings: ServerSettings,
    environment: Environment,
    *,
    chat_format: str | None = None,
    opener: Opener | None = None,
    version: str = "0",
    write: Callable[[str], object] | None = None,
    spawned: Spawned | None = None,
) -> tuple[Service, ASGIApp]:
    """Everything but the sockets; inside a running event loop. opener: how engines are made; write: where log lines go.

    version: what it says of itself. spawned: the process of the first engine that is opened, started ahead.

    Raises `ConfigError`.
    """
    keys = read_keys(settings.api_keys, environment.api_keys)
    metrics, journal = Metrics(), Journal(settings.log, write)
    observer: Observer = metrics
    at_end: list[Callable[[], None]] = []
    if settings.otlp_endpoint is not None:
        observer = Telemetry(metrics, otlp_exporter(settings.otlp_endpoint))
        at_end.append(observer.close)
    open_engine = opener or process_opener(settings, environment, spawned)
    adapters = None if settings.adapters is None else AdapterFolder(settings.adapters)
    models = []
    for n, source in enumerate(sources):
        own = Path(source).name.removesuffix(".gguf") if Path(source).exists() else source
        names = (*settings.served_model_name, own) if n == 0 else (own,)
        names = tuple(dict.fromkeys(names))
        options: dict[str, Any] = {"chat_format": chat_format, "adapters": adapters, "media_folder": settings.media_folder}
        models.append(ServedModel(source, names, open_engine, settings.limits, observer, **options))
    service = Service(settings, models, metrics, journal, version, at_end=at_end)
    return service, make_app(service, keys, open_storage(settings.storage, environment.cache_dir, settings.port))


def process_opener(settings: ServerSettings, environment: Environment, spawned: Spawned | None = None) -> Opener:
    """Engines in processes of their own, which get of the environment what they need and no keys. spawned: for the first of them."""
    engine, cpus = settings.engine, allowed_cpus()  # engines of later models get them too, whatever this process keeps to by then
    ready = [] if spawned is None else [spawned]

    def open_engine(model: str, text_folder: str, **listeners: Any) -> Engine:
        spec = EngineSpec(
            model=model,
            text_folder=text_folder,
            dtype=engine.dtype,
            threads=engine.threads,
            pin=engine.pin,
            huge_pages=engine.huge_pages,
            cpus=cpus,
            page_size=engine.page_size,
            num_pages=engine.num_pages,
            max_length=engine.max_length,
            token_budget=engine.token_budget,
            idle_budget=engine.idle_budget,
            max_running=engine.max_running,
            prefix_sharing=engine.prefix_sharing,
            text_only=engine.text_only,
            adapters="" if settings.adapters is None else str(settings.adapters.resolve()),
            max_adapters=engine.max_adapters,
            adapter_bytes=engine.adapter_bytes,
            quantize=engine.quantize,
            kv=engine.kv,
            speculative=engine.speculative,
            draft_model=engine.draft_model,
            draft_tokens=engine.draft_tokens,
        )
        return EngineProcess(
            spec, environment.for_children, stuck_seconds=engine.stuck_seconds, spawned=ready.pop() if ready else None, **listeners
        )

    return open_engine
