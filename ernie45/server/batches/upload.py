"""Reading an uploaded file: a multipart form, written to the disk as it comes, bounded in bytes, time, parts and headers."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from ernie45.server.batches.files import Part
from ernie45.server.batches.storage import Storage
from ernie45.server.failures import Failure, bad
from ernie45.server.settings import Limits

_OVERHEAD = 64 << 10  # bytes of a form beside its file
_FIELD = 1024  # bytes of a field
_FIELDS = 16


@dataclass
class _Form:
    """What the parser has found. data: of the file, not written yet."""

    fields: dict[str, bytes] = field(default_factory=dict)
    name: str | None = None
    data: bytearray = field(default_factory=bytearray)
    over: bool = False
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _headers: dict[str, str] = field(default_factory=dict)
    _at: str | None = None

    def callbacks(self) -> Any:
        """For the parser."""
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_part,
            "on_part_data": self._take,
            "on_end": self._end,
        }

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value.decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def _begin_part(self) -> None:
        _, options = parse_options_header(_latin(self._headers.get("content-disposition", "")))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self.name is not None:
                raise bad("the form holds more than one file", "file")
            if b"filename" not in options:
                raise bad("file must be a file, with a name", "file")
            self.name, self._at = _clean(options[b"filename"].decode("utf-8", "replace")), None
        else:
            if not name or name in self.fields or len(self.fields) == _FIELDS:
                raise bad(f"the form holds a field twice, too many of them, or one without a name: '{name[:80]}'", name[:80] or None)
            self.fields[name], self._at = b"", name

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._at is None:
            self.data += data[start:end]
            return
        self.fields[self._at] += data[start:end]
        if len(self.fields[self._at]) > _FIELD:
            raise bad(f"the form's field '{self._at[:80]}' is longer than {_FIELD} bytes", self._at[:80])

    def _end(self) -> None:
        self.over = True


@dataclass(frozen=True)
class Upload:
    """A file on the disk that is not kept yet, and the form's other fields."""

    part: Part
    name: str
    fields: dict[str, str]


async def read_upload(request: Request, storage: Storage, limits: Limits) -> Upload:
    """Raises `Failure`: 400, 408, 413, 415, 507. Nothing is left on the disk then."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Failure(415, "a file is uploaded as multipart/form-data with a boundary", code="unsupported_media_type")
    most = limits.file_bytes + _OVERHEAD
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(limits)
    form = _Form()
    part = await storage.run(Part, storage.database)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async with asyncio.timeout(limits.upload_seconds):
            async for data in _patient(request, limits.read_seconds):
                parser.write(data)
                if form.data:
                    if part.size + len(form.data) > limits.file_bytes:
                        raise _too_large(limits)
                    await storage.run(part.write, bytes(form.data))
                    form.data.clear()
        if not form.over:
            raise bad("the form ends before its last boundary")
        if form.name is None:
            raise bad("the form holds no file", "file", "missing_required_parameter")
        return Upload(part, form.name, {name: value.decode("utf-8", "replace") for name, value in form.fields.items()})
    except BaseException as error:
        await storage.run(part.drop)
        if isinstance(error, TimeoutError):
            raise Failure(408, "the file did not arrive in time", code="request_timeout", headers={"Connection": "close"}) from None
        if isinstance(error, FormParserError):
            raise bad(f"the form cannot be read: {str(error)[:200]}") from None
        raise


async def _patient(request: Request, seconds: float) -> AsyncIterator[bytes]:
    """Pieces of the body, each within so many seconds."""
    pieces = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(seconds):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except ClientDisconnect:
            raise Failure(499, "the client went away", code="client_gone") from None
        if piece:
            yield piece


def _too_large(limits: Limits) -> Failure:
    text = f"the file is larger than {limits.file_bytes:,} bytes"
    return Failure(413, text, field="file", code="request_too_large", headers={"Connection": "close"})


def _latin(text: str) -> str:
    """UTF-8 as the parser of options takes and gives it: byte by byte."""
    return text.encode("utf-8", "replace").decode("latin-1")


def _clean(name: str) -> str:
    """A file's name without folders and control characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in last if char.isprintable())[:255] or "file"
