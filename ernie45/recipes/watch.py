"""`ernie watch RUN ...`: a page that shows training runs while they learn, several laid over one another.

ernie watch run                       one run, on http://127.0.0.1:8010
ernie watch runs                      every run in a folder; new ones appear by themselves
ernie watch one two --port 9000       two runs laid over each other
"""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ernie45.config import Environment
from ernie45.errors import ConfigError, MissingExtra, RunError

try:
    import uvicorn

    from ernie45.server.run_log import find_runs
    from ernie45.server.settings import ServerSettings
    from ernie45.server.watching import make_app
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "uvicorn", "serve") from None


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Show training runs on a web page: losses, rates, experts, throughput and samples, live."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, or folders that hold such folders."""
    host: str = "127.0.0.1"
    """Address to listen on. The page has no password: open it to a network only where everyone may see your runs."""
    port: int = 8010
    """Port to listen on; 0 takes a free one."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("ernie watch needs the folder of a run, or a folder of runs")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")


def run(config: WatchConfig, environment: Environment) -> int:
    """Show the page until interrupted. Raises RunError for a folder that is not there."""
    return asyncio.run(watch(config))


async def watch(config: WatchConfig, started: Callable[[str], None] | None = None, stop: asyncio.Event | None = None) -> int:
    """The page's life. started: called with its address once it answers. stop: ends it when set."""
    from ernie45.server.listener import listen

    for path in config.runs:
        if not path.is_dir():
            raise RunError(f"{path}: is no folder; give the --out folder of a run, or a folder that holds such folders")
    settings = ServerSettings(host=config.host, port=config.port)
    link = listen(settings)
    host, port = link.getsockname()[:2]
    app = make_app(config.runs, settings.hosts())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", server_header=False))
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    running = asyncio.ensure_future(server.serve(sockets=[link]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        found = len(find_runs(config.runs))
        print(f"{found} run{'' if found == 1 else 's'} on {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
        if started is not None:
            started(address)
        if stop is not None:
            await stop.wait()
            server.should_exit = True
        await running
    finally:
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        link.close()
    return 0
