"""The page that shows training runs: `/` and two routes of numbers. It reads folders that were named at the start, and writes nothing.

A request names a run by its name, never by a path, so no path of a request reaches the disk.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ernie45.server import pages
from ernie45.server.access import host_name
from ernie45.server.run_log import RunFolder, find_runs

_NUMBERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Runs:
    """The runs below the given folders, found again at each look: one that starts later appears by itself."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._known: dict[Path, RunFolder] = {}

    def look(self) -> list[RunFolder]:
        """All of them; readers are kept, so that only what is new is read."""
        found = find_runs(self.paths)
        kept = {}
        for run in found:
            known = self._known.get(run.folder, run)
            known.name = run.name
            kept[run.folder] = known
        self._known = kept
        return list(kept.values())


class HostCheck:
    """Refuses requests for names that are not the page's own: another site's name that was made to point here cannot read it."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and host_name(Headers(scope=scope).get("host", "")) not in self._hosts:
            app = PlainTextResponse("this host name is not the page's own", status_code=403)
        await app(scope, receive, send)


def make_app(paths: Sequence[Path], hosts: frozenset[str] | None) -> Starlette:
    """The application. hosts: names under which it may be asked for; None: any."""
    runs, assets = Runs(paths), pages.read_assets()

    async def all_runs(request: Request) -> Response:
        reports = await to_thread.run_sync(lambda: [run.report() for run in runs.look()])
        return JSONResponse({"runs": reports}, headers=_NUMBERS)

    async def load(request: Request) -> Response:
        name, layer = request.query_params.get("run", ""), request.query_params.get("layer", "0")
        found = [run for run in await to_thread.run_sync(runs.look) if run.name == name]
        if not found:
            return JSONResponse({"error": f"there is no run '{name[:100]}'"}, status_code=404, headers=_NUMBERS)
        if not (layer.isascii() and layer.isdigit() and len(layer) < 6):
            return JSONResponse({"error": "layer must be a number, 0 for the first expert layer"}, status_code=400, headers=_NUMBERS)
        data = await to_thread.run_sync(partial(found[0].load_over_time, int(layer)))
        return JSONResponse(data, headers=_NUMBERS)

    async def file(request: Request) -> Response:
        return pages.respond(assets.get(request.path_params["name"]), request)

    routes = [
        Route("/", pages.page(assets, "watch.html")),
        Route("/runs.json", all_runs),
        Route("/load.json", load),
        Route("/web/{name}", file),
    ]
    return Starlette(routes=routes, middleware=[Middleware(HostCheck, hosts=hosts)] if hosts is not None else [])
