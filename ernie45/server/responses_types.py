"""OpenAI's responses as types, and as the chat request that says the same."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ernie45.server.failures import bad
from ernie45.server.protocol import ChatRequest, Fields, StreamOptions, read_fields


class Reasoning(Fields):
    """How much to think. summary: what is shown; all of it is."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Fields):
    """The shape of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Fields):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(Fields):
    """A function of the client: the only kind of tool here."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesRequest(Fields):
    """POST /v1/responses."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    safety_identifier: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)


REFUSED: Mapping[str, str] = {
    "access_programs": "there are no programs here",
    "background": "answers are made while you wait, or streamed",
    "background_options": "answers are made while you wait, or streamed",
    "context_management": "this server does not edit conversations; send what is to be read",
    "conversation": "conversations are not kept; use previous_response_id",
    "image": "this server makes no images",
    "include": "there is nothing more to include",
    "max_tool_calls": "this server calls no tools itself",
    "moderation": "there is no moderation model here",
    "prompt": "there are no stored prompts here",
    "prompt_cache_options": "the prompt cache has no options",
    "prompt_cache_retention": "cached prompts stay in memory until their place is needed: leave it out, or in_memory",
    "service_tier": "there is one tier: leave it out, or auto or default",
    "truncation": "nothing is cut out of a conversation: leave it out, or disabled",
}
_ASKS_NOTHING: Mapping[str, Sequence[Any]] = {
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),
    "truncation": ("disabled",),
}


def without_neutral(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without refused fields whose value asks for nothing."""
    return {name: value for name, value in body.items() if value not in _ASKS_NOTHING.get(name, ())}


def as_chat(asked: ResponsesRequest, earlier: Sequence[dict[str, Any]]) -> ChatRequest:
    """The same as a chat request, behind the messages of an earlier response. Raises `Failure` 400."""
    messages = ([{"role": "system", "content": asked.instructions}] if asked.instructions else []) + [*earlier, *messages_of(asked.input)]
    if not messages:
        raise bad("input is empty", "input")
    chat: dict[str, Any] = {"messages": messages}
    names = ("model", "temperature", "top_p", "parallel_tool_calls", "user", "safety_identifier", "prompt_cache_key", "stream_options")
    chat |= {name: value for name in names if (value := getattr(asked, name)) is not None}
    if asked.stream_options is not None:
        raise bad("stream_options is not supported here: a response's stream ends with its usage", "stream_options")
    if asked.max_output_tokens is not None:
        chat["max_tokens"] = asked.max_output_tokens
    if asked.top_logprobs:
        raise bad("log probabilities are given by /v1/chat/completions", "top_logprobs")
    if asked.tools:
        chat["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in asked.tools]
    if isinstance(asked.tool_choice, dict):
        if asked.tool_choice.get("type") != "function" or not isinstance(asked.tool_choice.get("name"), str):
            raise bad("tool_choice must be none, auto, required, or a function's type and name", "tool_choice")
        chat["tool_choice"] = {"type": "function", "function": {"name": asked.tool_choice["name"]}}
    elif asked.tool_choice is not None:
        chat["tool_choice"] = asked.tool_choice
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        chat["reasoning_effort"] = asked.reasoning.effort
    form = asked.text.format if asked.text else None
    if form is not None and form.type == "json_schema":
        chat["response_format"] = {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}
    elif form is not None:
        chat["response_format"] = {"type": form.type}
    return read_fields(ChatRequest, chat, {})


def messages_of(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input items as chat messages. Thinking and calls join the assistant's message they belong to."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    thoughts = ""
    for n, item in enumerate(given):
        where, kind = f"input[{n}]", item.get("type", "message")
        if kind == "message":
            message = {"role": item.get("role"), "content": _seen(item.get("content"), f"{where}.content")}
            if thoughts and item.get("role") == "assistant":
                message["reasoning"], thoughts = thoughts, ""
            messages.append(message)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            thoughts = _text(parts, f"{where}.content")
        elif kind == "function_call":
            call: dict[str, Any] = {"id": str(item.get("call_id") or ""), "type": "function"}
            call["function"] = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": "", "tool_calls": []} | ({"reasoning": thoughts} if thoughts else {}))
                thoughts = ""
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": _text(item.get("output"), f"{where}.output")}
            )
        else:
            raise bad(f"{where}: items of type {str(kind)[:40]!r} are not read here", where)
    return messages


def _seen(content: Any, where: str) -> str | list[dict[str, Any]]:
    """A message's content: its text, or with images its parts in order."""
    if not isinstance(content, list) or not any(isinstance(part, dict) and part.get("type") == "input_image" for part in content):
        return _text(content, where)
    parts: list[dict[str, Any]] = []
    for n, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "input_image":
            if part.get("file_id") is not None:
                raise bad(
                    f"{where}[{n}]: this server keeps no files; send the image as a data: address in image_url", f"{where}[{n}].file_id"
                )
            parts.append({"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail") or "auto"}})
        else:
            parts.append({"type": "text", "text": _text([part], f"{where}[{n}]")})
    return parts


def _text(content: Any, where: str) -> str:
    """The text of a content: itself, or of its parts."""
    if isinstance(content, str):
        return content
    kinds = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") in kinds and isinstance(p.get("text"), str) for p in content
    ):
        return "\n".join(part["text"] for part in content)
    raise bad(f"{where}: a text or parts of text are read here", where)
