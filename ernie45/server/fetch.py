"""Fetching pictures that requests name by address: from hosts of a list, over connections to addresses that were looked at first.

A name is resolved once, every address behind it must belong to the open internet, and the connection goes to one of just these: a name
that points elsewhere a moment later changes nothing. Redirects are read and held to the list in the same way. Proxies, cookies and
credentials do not exist here.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import h11

from ernie45.errors import RequestError
from ernie45.server.failures import bad
from ernie45.server.remote import Origin, Remote, is_public, read_address

Dial = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Resolve = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS = 3
_CONNECT_SECONDS = 5.0
_AT_ONCE = 8  # fetches of the whole server
_PIECE = 64 << 10
_MOVED = (301, 302, 303, 307, 308)
_TYPES = ("image/", "video/", "application/octet-stream", "binary/octet-stream")


async def resolved(host: str, port: int) -> list[str]:
    """All network addresses of a name, as the system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class _Answer:
    """What a host said: where to go instead, or the bytes."""

    location: str = ""
    body: bytes = b""


class Fetcher:
    """For the event loop's thread. origins: whom it may ask;  seconds: for all pictures of one conversation together."""

    def __init__(
        self,
        origins: frozenset[Origin],
        seconds: float,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolved,
        dial: Dial = asyncio.open_connection,
    ) -> None:
        self._origins = origins
        self._seconds = seconds
        self._tls = tls or ssl.create_default_context()
        self._resolve = resolve
        self._dial = dial
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def all(self, places: Mapping[str, str], most: int) -> dict[str, bytes]:
        """The bytes behind addresses, at most so many together. places: what the request calls the part, by address.

        Raises `Failure` 400 that names the part.
        """
        left, end = [most], asyncio.get_running_loop().time() + self._seconds

        async def one(address: str, where: str) -> bytes:
            try:
                async with asyncio.timeout_at(end):
                    return await self._one(address, left)
            except TimeoutError:
                raise bad(f"{where}: could not be fetched within {self._seconds:g} s", where, "media_not_fetched") from None
            except RequestError as error:
                raise bad(f"{where}: {error}", where, "media_not_fetched") from None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {address: group.create_task(one(address, where)) for address, where in places.items()}
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return {address: task.result() for address, task in tasks.items()}

    async def _one(self, address: str, left: list[int]) -> bytes:
        remote = read_address(address)
        async with self._slots:
            for _ in range(1 + _REDIRECTS):
                answer = await self._ask(remote, left)
                if not answer.location:
                    return answer.body
                remote = remote.follow(answer.location)
        raise RequestError(f"{address[:200]} leads on to another address more than {_REDIRECTS} times")

    async def _ask(self, remote: Remote, left: list[int]) -> _Answer:
        origin = remote.origin
        if origin not in self._origins:
            raise RequestError(f"{origin.scheme}://{origin.authority} is not among the hosts that this server fetches pictures from")
        reader, writer = await self._connected(origin)
        try:
            return await _exchange(reader, writer, remote, left)
        except (OSError, h11.RemoteProtocolError):
            raise RequestError(f"{origin.authority} broke off, or does not speak HTTP") from None
        finally:
            writer.transport.abort()

    async def _connected(self, origin: Origin) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to an address that has been looked at. Raises `RequestError`."""
        options: dict[str, Any] = {"ssl": self._tls, "server_hostname": origin.host} if origin.scheme == "https" else {}
        for address in await self._addresses(origin):
            with contextlib.suppress(OSError):  # a refused connection, a failed handshake, too slow: the next one
                async with asyncio.timeout(_CONNECT_SECONDS):
                    return await self._dial(address, origin.port, **options)
        raise RequestError(f"{origin.authority} cannot be reached")

    async def _addresses(self, origin: Origin) -> list[str]:
        if origin.literal:  # the operator's own word: in the list as it is
            return [origin.host]
        try:
            found = await self._resolve(origin.host, origin.port)
        except OSError:
            raise RequestError(f"{origin.host} cannot be reached") from None
        if not found or not all(is_public(address) for address in found):
            raise RequestError(f"{origin.host} does not stand for an address of the open internet")
        return found[:2]


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: Remote, left: list[int]) -> _Answer:
    """One GET. Bytes are taken off `left` as they come. Raises `RequestError`, `OSError`, `h11.RemoteProtocolError`."""
    link = h11.Connection(h11.CLIENT)
    headers = [("Host", remote.origin.authority), ("User-Agent", "ernie45"), ("Accept", "image/*, video/*")]
    headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
    writer.write(link.send(h11.Request(method="GET", target=remote.path, headers=headers)) + link.send(h11.EndOfMessage()))
    await writer.drain()
    body = bytearray()
    while True:
        event = link.next_event()
        if event is h11.NEED_DATA:
            link.receive_data(await reader.read(_PIECE))
        elif isinstance(event, h11.Response):
            if event.status_code in _MOVED and (location := _header(event, b"location")):
                return _Answer(location=location)
            _check_head(event, remote, left[0])
        elif isinstance(event, h11.Data):
            left[0] -= len(event.data)
            if left[0] < 0:
                raise _too_large(remote)
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return _Answer(body=bytes(body))
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("the connection ended before an answer")


def _check_head(event: h11.Response, remote: Remote, most: int) -> None:
    """Refuses before the body is read what it would be in vain to read."""
    host = remote.origin.authority
    if event.status_code != 200:
        raise RequestError(f"{host} answered with status {event.status_code}")
    kind, coding, length = (_header(event, name).lower() for name in (b"content-type", b"content-encoding", b"content-length"))
    if not kind.startswith(_TYPES):
        raise RequestError(f"{host} sends {kind[:60] or 'something without a type'!r}, no image or video")
    if coding not in ("", "identity"):
        raise RequestError(f"{host} sends a packed body ({coding[:40]!r}), which is not unpacked here")
    if length.isdecimal() and int(length) > most:
        raise _too_large(remote)


def _header(event: h11.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in event.headers if key == name), "")


def _too_large(remote: Remote) -> RequestError:
    return RequestError(f"with what {remote.origin.authority} sends, the pictures of the conversation are too large")
