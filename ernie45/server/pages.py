"""The web page's files as the server hands them out: from memory, under a policy that lets nothing in from outside.

The page has no build step: what lies in `web/` is what the browser gets. A request can only name one of those files, so no path of a
request ever reaches the disk. The pages themselves hold no secret and need no key; the data they ask for does.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

FOLDER = Path(__file__).parent / "web"

# Paths that are to be answered without a key; the last one stands for everything below it.
PUBLIC_PATHS = ("/", "/status", "/web/")

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing is allowed but what is named. Trusted types take `innerHTML` and its kin away from our own code too: text that a model wrote
# has no road to markup, even by a mistake of ours.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Kept by the browser, but asked about each time: after an update nobody runs half of the old page.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page: its bytes, its media type, and the quoted tag that stands for exactly these bytes."""

    body: bytes
    media_type: str
    etag: str


def is_public(path: str) -> bool:
    """Whether a path is one of the page's own, which are answered without a key."""
    return path in PUBLIC_PATHS[:2] or path.startswith(PUBLIC_PATHS[2])


def read_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """Every file of the page by its name; a file of a kind that `MEDIA_TYPES` does not know is an error of ours."""
    assets = {}
    for path in sorted(folder.iterdir()):
        assert path.suffix in MEDIA_TYPES, f"{path.name} has no media type"
        body = path.read_bytes()
        assets[path.name] = Asset(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return assets


def holds_tag(header: str, etag: str) -> bool:
    """Whether an `If-None-Match` header names this tag; weak tags compare equal here (RFC 9110, 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def respond(asset: Asset | None, request: Request) -> Response:
    """The file, or 304 when the browser has it, or 404; the policy goes with each of them."""
    if asset is None:
        return PlainTextResponse("there is no such file", status_code=404, headers=HEADERS)
    headers = {**HEADERS, "ETag": asset.etag}
    if holds_tag(request.headers.get("if-none-match", ""), asset.etag):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.media_type, headers=headers)


def page(assets: Mapping[str, Asset], name: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that always answers with one file."""

    async def handle(request: Request) -> Response:
        return respond(assets[name], request)

    return handle


def router(folder: Path = FOLDER) -> APIRouter:
    """Routes of the page: `/` (chat), `/status`, and `/web/NAME` for what they load. The files are read once, here."""
    assets = read_assets(folder)

    async def file(name: str, request: Request) -> Response:
        return respond(assets.get(name), request)

    routes = APIRouter(include_in_schema=False)
    methods = ["GET", "HEAD"]
    routes.add_api_route("/", page(assets, "index.html"), methods=methods)
    routes.add_api_route("/status", page(assets, "status.html"), methods=methods)
    routes.add_api_route("/web/{name}", file, methods=methods)
    return routes
