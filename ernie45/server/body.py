"""Reading a request's body: bounded in bytes, time and depth, and strict about what JSON is."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ernie45.server.failures import Failure, bad
from ernie45.server.settings import Limits


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request. Raises `Failure`: 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(415, f"the body must be application/json, not {kind[:80] or 'without a type'}", code="unsupported_media_type")
    return parse_json(await read_bytes(request, limits.body_bytes, limits.read_seconds), limits.json_depth)


async def read_bytes(request: Request, most: int, seconds: float) -> bytes:
    """The body, at most so many bytes in so many seconds. Raises `Failure` 408 or 413."""
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise Failure(
            408, f"the body did not arrive within {seconds:g} s", code="request_timeout", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise Failure(499, "the client went away", code="client_gone") from None
    return bytes(body)


def _too_large(most: int) -> Failure:
    return Failure(413, f"the body is larger than {most:,} bytes", code="request_too_large", headers={"Connection": "close"})


def parse_json(data: bytes, depth: int) -> dict[str, Any]:
    """A JSON object. NaN and infinities, repeated keys, lone surrogates and deep nesting are refused. Raises `Failure` 400."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8 at byte {error.start}") from None
    _check_depth(text, depth)
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_pairs)
    except Failure:
        raise
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise bad(f"the body must be a JSON object, not {_word(value)}")
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def _check_depth(text: str, most: int) -> None:
    """Counts brackets outside strings before anything is built from them."""
    depth, inside, escaped = 0, False, False
    if text.count("[") + text.count("{") <= most:
        return
    for char in text:
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            if depth > most:
                raise bad(f"the body is nested more than {most} deep")
        elif char in "]}":
            depth -= 1


def _no_constant(word: str) -> Any:
    raise bad(f"{word} is not JSON; numbers must be finite")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise bad(f"'{twice[:80]}' is in the same object twice")
    return made


def _check_surrogates(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad("a text holds half of a surrogate pair, which is no character") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_surrogates(name)
            _check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item)


def _word(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
