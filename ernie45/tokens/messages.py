"""Conversations as values: messages, their parts, and tool calls; read from the chat form everybody sends (OpenAI's).

Values only: an image here is a number of tokens and where it came from, never pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie45.errors import TokenizerError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image part: how many tokens it takes in the prompt (None: not measured yet), and its address for whoever loads it.

    detail "low" asks for a smaller picture of fewer tokens; "auto" and "high" are the model's usual size.
    """

    tokens: int | None = None
    source: str = ""
    detail: Literal["auto", "high", "low"] = "auto"


@dataclass(frozen=True)
class Video:
    """A video part, as `Image`. fps: frames a second to look at;  frames: so many instead; None leaves it to whoever loads it."""

    tokens: int | None = None
    source: str = ""
    fps: float | None = None
    frames: int | None = None


Part = Text | Image | Video


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. `arguments` is JSON text exactly as written; `valid` says whether it is a JSON object; `id` names the call."""

    name: str
    arguments: str
    id: str = ""
    valid: bool = True


@dataclass(frozen=True)
class Message:
    """One message.

    content    text, or parts in order
    reasoning  an assistant's thinking, apart from its answer
    tool_calls calls an assistant makes;  tool_call_id: the call a tool message answers;  name: of that tool or speaker
    learned    whether training learns this (assistant) message; None leaves it to the renderer, which learns every answer
    trusted    whether control tokens written in the text become their ids, as grounding data needs; never for text of a stranger
    """

    role: str
    content: str | tuple[Part, ...] = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    learned: bool | None = None
    trusted: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts, whichever form it has."""
        if isinstance(self.content, str):
            return (Text(self.content),) if self.content else ()
        return self.content

    @property
    def text(self) -> str:
        """The text parts, one a line."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """The image and video parts in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any], where: str = "message") -> "Message":
        """A message from its OpenAI form. `reasoning_content` is read as `reasoning`; `content` may be null beside tool calls.

        Raises TokenizerError naming `where` and the field.
        """
        allowed = {*cls.__dataclass_fields__, "reasoning_content"} - {"trusted"}  # a stranger may not call himself trusted
        for key in value:
            if key not in allowed:
                raise TokenizerError(f"{where}: '{key}' is not a field of a message{did_you_mean(str(key), allowed)}")
        calls = value.get("tool_calls") or ()
        if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
            raise TokenizerError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
        return cls(
            role=value.get("role", ""),
            content=_content(value.get("content"), where, may_be_empty=bool(calls)),
            reasoning=value["reasoning"] if value.get("reasoning") is not None else value.get("reasoning_content"),
            tool_calls=tuple(_tool_call(call, f"{where}: tool_calls[{n}]") for n, call in enumerate(calls)),
            tool_call_id=value.get("tool_call_id"),
            name=value.get("name"),
            learned=value.get("learned"),
        )


def as_messages(messages: Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """A checked conversation from messages or their OpenAI form. Raises TokenizerError that names the message by its index."""
    if isinstance(messages, str | Mapping | Message) or not isinstance(messages, Sequence):
        raise TokenizerError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise TokenizerError("messages is empty; a conversation needs at least one message")
    checked = []
    for index, value in enumerate(messages):
        where = f"messages[{index}]"
        if isinstance(value, Mapping):
            value = Message.from_mapping(value, where)
        elif not isinstance(value, Message):
            raise TokenizerError(f"{where} must be a message, an object with role and content, not {type(value).__name__}")
        _check(value, where)
        checked.append(value)
    return tuple(checked)


def _check(message: Message, where: str) -> None:
    if message.role not in ROLES:
        raise TokenizerError(f"{where}: role {message.role!r:.60} is not known{did_you_mean(str(message.role), ROLES)}")
    if not isinstance(message.content, str) and not (
        isinstance(message.content, tuple) and all(isinstance(part, Text | Image | Video) for part in message.content)
    ):
        raise TokenizerError(f"{where}: content must be a text or a tuple of Text, Image, Video, not {type(message.content).__name__}")
    for field in ("reasoning", "tool_call_id", "name"):
        value = getattr(message, field)
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"{where}: {field} must be a text, not {type(value).__name__}")
    if not isinstance(message.learned, bool | None) or not isinstance(message.trusted, bool):
        raise TokenizerError(f"{where}: learned must be true, false or null, and trusted true or false")
    if message.role != "assistant":
        for field in ("reasoning", "tool_calls", "learned"):
            if getattr(message, field):
                raise TokenizerError(f"{where}: only an assistant message may have {field}, this one is of role {message.role}")
    if message.role == "tool" and not message.tool_call_id:
        raise TokenizerError(f"{where}: a tool message needs tool_call_id, the id of the call it answers")
    if message.role != "tool" and message.tool_call_id is not None:
        raise TokenizerError(f"{where}: only a tool message may have tool_call_id, this one is of role {message.role}")
    for n, part in enumerate(message.media):
        if part.tokens is not None and (not isinstance(part.tokens, int) or isinstance(part.tokens, bool) or part.tokens < 1):
            raise TokenizerError(f"{where}: media part {n} must take at least one token, not {part.tokens!r:.60}")


def _content(value: object, where: str, may_be_empty: bool) -> str | tuple[Part, ...]:
    if value is None and may_be_empty:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return tuple(_part(part, f"{where}: content[{n}]") for n, part in enumerate(value))
    raise TokenizerError(f"{where}: content must be a text or a list of parts, not {'null' if value is None else type(value).__name__}")


def _part(value: object, where: str) -> Part:
    if isinstance(value, Text | Image | Video):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise TokenizerError(f"{where} must be an object with a 'type', not {value!r:.60}")
    if kind == "text":
        if not isinstance(value.get("text"), str):
            raise TokenizerError(f"{where}: a text part needs 'text', not {value.get('text')!r:.60}")
        return Text(value["text"])
    if kind not in ("image", "image_url", "video", "video_url"):
        raise TokenizerError(f"{where}: type {kind!r:.60} is not known; allowed: text, image_url, image, video_url, video")
    return _medium(kind, value, where)


def _medium(kind: str, value: Mapping[str, Any], where: str) -> Image | Video:
    """An image or video part: OpenAI's `image_url` and `video_url` with an object, the same as a bare address, or a block with `source`."""
    given = value.get(kind, value.get("source", ""))
    table: Mapping[str, Any] = given if isinstance(given, Mapping) else {"url": given}
    if table.get("type") == "base64":
        table = {"url": f"data:{table.get('media_type')};base64,{table.get('data')}"}
    source = table.get("url", "")
    if not isinstance(source, str):
        raise TokenizerError(f"{where}: '{kind}' must be an address, or an object with 'url', not {type(source).__name__}")
    allowed = {"url", "type", *(("detail",) if kind.startswith("image") else ("fps", "num_frames"))}
    for name in table:
        if name not in allowed:
            raise TokenizerError(f"{where}: '{name}' is not a setting of a part of type {kind}{did_you_mean(str(name), allowed)}")
    if kind.startswith("video"):
        return Video(value.get("tokens"), source, table.get("fps"), table.get("num_frames"))
    detail = table.get("detail") or "auto"
    if detail not in ("auto", "high", "low"):
        raise TokenizerError(f"{where}: detail is {detail!r:.40}; allowed: auto, high, low")
    return Image(value.get("tokens"), source, detail)


def _tool_call(value: object, where: str) -> ToolCall:
    if isinstance(value, ToolCall):
        return value
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise TokenizerError(f"{where} needs function.name, a text; got {value!r:.80}")
    arguments = call.get("arguments", "{}")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise TokenizerError(f"{where}: arguments must be JSON text or an object, not {type(arguments).__name__}")
    return ToolCall(call["name"], arguments, str(value.get("id") or ""), is_json_object(arguments))


def is_json_object(text: str) -> bool:
    """Whether a text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
