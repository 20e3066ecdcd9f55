"""Serve models over HTTP, as OpenAI's and Anthropic's clients expect.

ernie serve                          the starter model on http://127.0.0.1:8000
ernie serve FOLDER --port 9000       another model, another port
ernie serve A B --api-keys keys.txt  two models, for those who have a key
"""

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ernie45 import __version__
from ernie45.config import Environment
from ernie45.engine.spawn import FAKE_NAME, Spawned, spawn
from ernie45.errors import CheckpointError, ConfigError, MissingExtra
from ernie45.machine import allowed_cpus, keep_to

try:
    from ernie45.server.settings import ServerSettings
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "fastapi", "serve") from None


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerSettings):
    """Serve models over HTTP with the protocols of OpenAI and Anthropic, on this machine only unless --host says more."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ("starter",)
    """Model folders, GGUF files or Hub names. The first is loaded at once, others when they are asked for."""
    chat_format: str | None = None
    """A known chat format for models without a template of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ConfigError("ernie serve needs a model, or none at all for the starter")
        if len(set(self.models)) != len(self.models):
            raise ConfigError("a model is named twice")


def run(config: ServeConfig, environment: Environment) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit code. Raises ErnieError subclasses for mistakes that show at the start."""
    return asyncio.run(serve(config, environment))


async def serve(config: ServeConfig, environment: Environment, started: Callable[[str], None] | None = None) -> int:
    """The server's life. started: called with its address once it answers."""
    began = time.perf_counter()
    spawned = None if config.models[0] == FAKE_NAME else await spawn(environment.for_children, ahead=True)
    try:
        return await _serve(config, environment, spawned, began, started)
    finally:
        if spawned is not None:
            spawned.link.close()
            await spawned.ended()


async def _serve(
    config: ServeConfig, environment: Environment, spawned: Spawned | None, began: float, started: Callable[[str], None] | None
) -> int:
    from ernie45.server.build import build
    from ernie45.server.listener import listen, make_server

    service, app = build(config.models, config, environment, chat_format=config.chat_format, version=__version__, spawned=spawned)
    link = listen(config)
    server = make_server(app, config)
    host, port = link.getsockname()[:2]
    address = f"{'https' if config.tls_certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"listening on {address}; loading {config.models[0]} ...", file=sys.stderr, flush=True)
    running = asyncio.ensure_future(server.serve(sockets=[link]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        _handle_signals(lambda: _stop(service, server, config.drain_seconds))
        first = service.models[0]
        await asyncio.wait([first.open(), running], return_when=asyncio.FIRST_COMPLETED)
        if first.state == "failed":
            raise CheckpointError(first.trouble)
        if first.info is not None:
            if first.info.cpus:
                keep_to(set(allowed_cpus()) - set(first.info.cpus))  # the front leaves these to the model, where others are left
            for name, value in first.info.settings.items():
                print(f"  {name:<10} {value}", file=sys.stderr)
            print(f"ready: {address}/v1 for clients, after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        gc.freeze()  # what is there by now stays: looking through it again and again would hold up answers
        if started is not None:
            started(address)
        await running
    finally:
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        await service.close()
        link.close()
    return 0


def _handle_signals(stop: Callable[[], Any]) -> None:
    """After uvicorn has set its own: a signal drains first. Threads of tests have no signals."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    for name in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(name, lambda: tasks.add(asyncio.ensure_future(stop())))
        except (RuntimeError, ValueError, NotImplementedError):
            return


async def _stop(service: Any, server: Any, seconds: float) -> None:
    """The first signal drains, a second one ends at once."""
    if service.draining:
        server.should_exit = server.force_exit = True
        return
    print(f"shutting down: running requests have {seconds:g} s, new ones are refused", file=sys.stderr, flush=True)
    await service.drain(seconds)
    await service.close()
    server.should_exit = True
