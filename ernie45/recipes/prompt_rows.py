"""Prompts in a file, a JSON object a line: a text, a conversation, a line of an OpenAI batch. Mistakes are named by line and field."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie45.engine.request import SamplingParams
from ernie45.errors import DataError, RequestError, did_you_mean

SETTINGS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "stop_token_ids", "ignore_eos", "bad_words_token_ids",
)  # fmt: skip
"""What a row may set for itself, over the flags."""
_NAMES = {"max_completion_tokens": "max_tokens", "bad_words_token_ids": "bad_words"}
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_LONGEST = 16 << 20  # characters of a line


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt: a text or ids, or the messages of a conversation. number: its line, from 1; settings: fields of `SamplingParams`."""

    number: int
    id: str | int | None
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be answered, and why."""

    number: int
    id: str | int | None
    field: str | None
    text: str

    def named(self, path: Path) -> str:
        """The same as a sentence."""
        return f"{path}:{self.number}{f', {self.field}' if self.field else ''}: {self.text}"


def read_rows(path: Path, defaults: Mapping[str, Any]) -> Iterator[Row | BadRow]:
    """The rows of a file; blank lines are passed over. defaults: settings under the rows'. Raises `DataError` for no readable file."""
    seen: dict[str | int, int] = {}
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    yield _row(data, number, defaults, seen)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _row(data: bytes, number: int, defaults: Mapping[str, Any], seen: dict[str | int, int]) -> Row | BadRow:
    id: str | int | None = None
    try:
        value = _parsed(data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)
        id = _id_of(value)
        if id is not None:
            if id in seen:
                raise RequestError(f"line {seen[id]} has the same id", "custom_id" if "custom_id" in value else "id")
            seen[id] = number
        return _checked(_body_of(value), number, id, defaults)
    except RequestError as error:
        return BadRow(number=number, id=id, field=error.field, text=str(error))


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > _LONGEST:
        raise RequestError(f"the line has {len(data):,} bytes; at most {_LONGEST:,} are read")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"it is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise RequestError('it must be a JSON object, such as {"prompt": "Hello"}')
    return value


def _id_of(value: Mapping[str, Any]) -> str | int | None:
    name = "custom_id" if "custom_id" in value else "id"
    id = value.get(name)
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        raise RequestError(f"{name} must be a text or a whole number", name)
    return id


def _body_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The request in a row: what a batch's line holds, or the row without its id."""
    if "url" not in value and "body" not in value:
        return {name: item for name, item in value.items() if name not in ("id", "custom_id")}
    unknown = sorted(set(value) - {"custom_id", "method", "url", "body"})
    if unknown:
        raise RequestError(f"'{unknown[0][:80]}' is not a field of a batch's line", unknown[0][:80])
    if value.get("method", "POST") != "POST":
        raise RequestError("method must be POST", "method")
    if value.get("url") not in _URLS:
        raise RequestError(f"url must be one of {', '.join(_URLS)}", "url")
    body = value.get("body")
    if not isinstance(body, dict):
        raise RequestError("body must be an object", "body")
    wanted = _URLS[value["url"]]
    if wanted not in body:
        raise RequestError(f"{value['url']} needs {wanted}", f"body.{wanted}")
    left_out = {name: item for name, item in body.items() if name != "model"}  # the command names the model
    if left_out.get("stream") is False or left_out.get("n") == 1:
        left_out = {name: item for name, item in left_out.items() if (name, item) not in (("stream", False), ("n", 1))}
    return left_out


def _checked(body: Mapping[str, Any], number: int, id: str | int | None, defaults: Mapping[str, Any]) -> Row:
    allowed = ("prompt", "messages", "tools", *SETTINGS, "max_completion_tokens")
    for name in body:
        if name not in allowed:
            raise RequestError(f"'{name[:80]}' is not a field of a row{did_you_mean(name, allowed)}", name[:80])
    if ("prompt" in body) == ("messages" in body):
        raise RequestError("a row has either prompt or messages", "prompt")
    settings = dict(defaults) | {_NAMES.get(name, name): item for name, item in body.items() if name in allowed[3:] and item is not None}
    SamplingParams(**settings)
    prompt, messages, tools = body.get("prompt"), body.get("messages"), body.get("tools")
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        prompt = tuple(prompt)
    if "prompt" in body and not (isinstance(prompt, str | tuple) and prompt):
        raise RequestError("prompt must be a text or a list of token ids, and not empty", "prompt")
    for name, items in (("messages", messages), ("tools", tools)):
        if items is not None and not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
            raise RequestError(f"{name} must be a list of objects, and not empty", name)
    if tools is not None and "messages" not in body:
        raise RequestError("tools need messages", "tools")
    return Row(
        number=number,
        id=id,
        prompt=prompt,
        messages=None if messages is None else tuple(messages),
        tools=None if tools is None else tuple(tools),
        settings=settings,
    )
