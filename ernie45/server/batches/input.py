"""A batch's input: JSON lines, each a request with an id of its own. What is wrong is named by line and field before anything runs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from ernie45.server.body import parse_json
from ernie45.server.failures import Failure
from ernie45.server.settings import Limits

_FIELDS = {"custom_id", "method", "url", "body"}
_LONGEST_ID = 512
_MOST_FAULTS = 100


@dataclass(frozen=True, kw_only=True)
class Line:
    """Where a request stands in the file: bytes `place` .. `place + size`. number: from 1; tries: how often the model broke on it."""

    number: int
    custom_id: str
    place: int
    size: int
    tries: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with the input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


def read_input(file: IO[bytes], endpoint: str, limits: Limits) -> tuple[list[Line], list[Fault]]:
    """The lines of an input file, and what is wrong with it: the first hundred faults. With a fault nothing may run."""
    lines: list[Line] = []
    faults: list[Fault] = []
    seen: dict[str, int] = {}
    for number, place, data in _raw(file, limits.body_bytes):
        if len(lines) + len(faults) >= limits.batch_lines:
            faults.append(Fault(code="too_many_requests", message=f"the file has more than {limits.batch_lines:,} requests", line=number))
            break
        try:
            custom_id = _checked(data, endpoint, limits)
            if custom_id in seen:
                raise _wrong("custom_id", f"line {seen[custom_id]} has the same custom_id", "duplicate_custom_id")
            seen[custom_id] = number
            lines.append(Line(number=number, custom_id=custom_id, place=place, size=len(data)))
        except Failure as failure:
            faults.append(Fault(code=failure.code or "invalid_json_line", message=str(failure), line=number, param=failure.field))
            if len(faults) == _MOST_FAULTS:
                break
    if not lines and not faults:
        faults.append(Fault(code="empty_file", message="the file holds no request"))
    return lines, faults


def _raw(file: IO[bytes], most: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of each line that is not blank; of a line that is too long, only its beginning."""
    number, place = 0, 0
    while data := file.readline(most + 2):
        number += 1
        whole = len(data)
        if whole == most + 2 and not data.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                whole += len(rest)
            whole += len(rest)
        if data.strip():
            yield number, place, data
        place += whole


def _checked(data: bytes, endpoint: str, limits: Limits) -> str:
    """The custom_id of a line. Raises `Failure` naming the field."""
    if len(data.rstrip(b"\r\n")) > limits.body_bytes:
        raise _wrong(None, f"the line is longer than {limits.body_bytes:,} bytes", "line_too_long")
    value = parse_line(data, limits)
    unknown = sorted(set(value) - _FIELDS)
    if unknown:
        name = unknown[0][:80]
        raise _wrong(name, f"'{name}' is not a field of a batch's line: custom_id, method, url, body", "unknown_field")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        raise _wrong("custom_id", f"custom_id must be a text of 1 to {_LONGEST_ID} characters", "invalid_custom_id")
    if value.get("method") != "POST":
        raise _wrong("method", "method must be POST", "invalid_method")
    if value.get("url") != endpoint:
        raise _wrong("url", f"url must be {endpoint}, the endpoint of the batch", "invalid_url")
    body = value.get("body")
    if not isinstance(body, dict):
        raise _wrong("body", "body must be a request, an object", "invalid_body")
    if body.get("stream"):
        raise _wrong("body.stream", "an answer of a batch is not streamed: leave stream out", "invalid_body")
    return custom_id


def parse_line(data: bytes, limits: Limits) -> dict[str, Any]:
    """A line's object, as strictly as a request's body is read. Raises `Failure`."""
    return parse_json(data.removeprefix(b"\xef\xbb\xbf"), limits.json_depth + 1)


def body_bytes(data: bytes, limits: Limits) -> bytes:
    """The request's body in a line that was checked."""
    return json.dumps(parse_line(data, limits)["body"], ensure_ascii=False).encode()


def _wrong(field: str | None, text: str, code: str) -> Failure:
    return Failure(400, text, field=field, code=code)
