"""The listening socket, and patience with clients: who sends a header or takes an answer too slowly is cut off."""

import asyncio
import socket
import ssl
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ernie45.errors import ConfigError
from ernie45.server.settings import ServerSettings
from ernie45.server.stream import CHUNKS


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say. Raises `ConfigError` when it cannot."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on '{settings.host}': {error.strerror or error}") from None
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the system itself drops a connection whose peer takes nothing for so long
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.limits.write_seconds * 1000))
        made.bind(address)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; take another --port") from None
    return made


class _Chunks:
    """`stream.Chunks` of one request: HTTP/1.1's framing, written here. h11 writes the head and the end, and keeps no count of what is
    between them."""

    def __init__(self, protocol: H11Protocol) -> None:
        self._cycle, self._flow, self._transport = protocol.cycle, protocol.flow, protocol.transport

    @property
    def ready(self) -> bool:
        """Whether the connection is there and its buffer has room."""
        return not (self._flow.write_paused or self._cycle.disconnected)

    def write(self, data: bytes) -> None:
        """Sends a part of the body, not empty; behind the head of a response without a length."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def make_server(app: ASGIApp, settings: ServerSettings) -> uvicorn.Server:
    """uvicorn with our patience, for `serve(sockets=[...])`. Raises `ConfigError` for a certificate that is none."""
    _check_certificate(settings)
    seconds = settings.limits.read_seconds

    class Patient(H11Protocol):
        """uvicorn's protocol, which by itself waits for ever for a header; and a short way for streams. Subclassed because uvicorn takes a
        class and calls it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._impatience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._impatience = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before and self.scope["http_version"] == "1.1":  # the application begins with the loop's next turn
                self.scope["extensions"] = cast(dict[str, Any], {CHUNKS: _Chunks(self)})
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy and self._impatience is not None:
                self._impatience.cancel()
                self._impatience = None
            elif not busy and self._impatience is None and not self.transport.is_closing():
                self._impatience = self.loop.call_later(seconds, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._impatience is not None:
                self._impatience.cancel()
            super().connection_lost(exc)

    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=settings.limits.connections,
        h11_max_incomplete_event_size=64 << 10,
        ssl_certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
    )
    return uvicorn.Server(config)


def _check_certificate(settings: ServerSettings) -> None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # what ssl raises is an OSError
        raise ConfigError(
            f"cannot speak HTTPS with {settings.tls_certificate} and {settings.tls_key}: {getattr(error, 'strerror', None) or error}; "
            "both are PEM files, the key without a password and that of the certificate"
        ) from None
