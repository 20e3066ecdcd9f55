"""Anthropic's messages as types, and as the chat request that says the same."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ernie45.server.failures import bad
from ernie45.server.protocol import ChatRequest, Fields, read_fields


class Thinking(Fields):
    """Whether to think, and how much. display: what is shown of it; all of it is."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized"] | None = None


class ToolChoice(Fields):
    """Whether a tool is to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class AnthropicTool(Fields):
    """A tool of the client."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class AnthropicMetadata(Fields):
    """Who asks."""

    user_id: str | None = Field(None, max_length=256)


class CountRequest(Fields):
    """POST /v1/messages/count_tokens. cache_control, here and in blocks, is taken as read: every prompt is cached."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    metadata: AnthropicMetadata | None = None


REFUSED = {
    "billing_policy": "nothing is billed here",
    "compaction": "this server does not edit conversations; send what is to be read",
    "container": "this server runs no code",
    "context_management": "this server does not edit conversations; send what is to be read",
    "diagnostics": "there are no diagnostics here",
    "fallback_credit_token": "nothing is billed here",
    "fallbacks": "the model that is named answers, or an error comes",
    "inference_geo": "the model runs where the server runs",
    "mcp_servers": "this server calls no other servers",
    "output_config": "use response_format of /v1/chat/completions for answers of a given shape",
    "output_format": "use response_format of /v1/chat/completions for answers of a given shape",
    "service_tier": "there is one tier: leave it out, or auto or standard_only",
    "speed": "there is one speed: leave it out, or standard",
    "thread": "conversations are not kept; send all messages",
    "user_profile_id": "there are no profiles here",
    "workspace_id": "there are no workspaces here",
}
NEUTRAL = {"service_tier": ("auto", "standard_only"), "speed": ("standard",)}


def without_refused(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without fields that ask for nothing; the others are refused by `read_fields`."""
    return {name: value for name, value in body.items() if name not in NEUTRAL or value not in NEUTRAL[name]}


def as_chat(asked: CountRequest, body: Mapping[str, Any]) -> ChatRequest:
    """The same as a chat request. Raises `Failure` 400."""
    messages: list[dict[str, Any]] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": _text(asked.system, "system")})
    for number, message in enumerate(asked.messages):
        messages += _message(message, f"messages[{number}]")
    chat: dict[str, Any] = {"messages": messages}
    if asked.model is not None:
        chat["model"] = asked.model
    if asked.tools:
        chat["tools"] = [_tool(tool) for tool in asked.tools]
    if asked.tool_choice is not None:
        chat |= _choice(asked.tool_choice)
    if asked.thinking is not None:
        chat["enable_thinking"] = asked.thinking.type != "disabled"
        if asked.thinking.budget_tokens is not None and asked.thinking.type == "enabled":
            chat["reasoning_max_tokens"] = asked.thinking.budget_tokens
    if isinstance(asked, MessagesRequest):
        chat["max_tokens"] = asked.max_tokens
        chat |= {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(asked, name)) is not None}
        if asked.stop_sequences:
            chat["stop"] = asked.stop_sequences
        if asked.metadata is not None and asked.metadata.user_id is not None:
            chat["user"] = asked.metadata.user_id
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        chat["continue_final_message"] = True
    return read_fields(ChatRequest, chat, {})


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    if choice.type == "tool":
        if choice.name is None:
            raise bad("tool_choice of type tool needs a name", "tool_choice.name")
        said: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        said = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    return {"tool_choice": said} | ({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})


def _message(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One message as one or, with results of tools, several."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad(f"{where}: role must be user or assistant, not {str(role)[:40]!r}", f"{where}.role")
    if set(message) - {"role", "content"}:
        raise bad(f"{where}: '{sorted(set(message) - {'role', 'content'})[0][:40]}' is not a field of a message", where)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise bad(f"{where}: content must be a text or a list of blocks", f"{where}.content")
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    parts: list[dict[str, Any]] = []  # of a user's message, in order
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for n, block in enumerate(content):
        place = f"{where}.content[{n}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text([block], place))
            parts.append({"type": "text", "text": texts[-1]})
        elif kind == "image" and role == "user":
            parts.append({"type": "image", "source": block.get("source")})
        elif kind == "tool_result" and role == "user":
            result, shown = _result(block, place)
            results.append(result)
            parts += shown
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block, place))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":
            raise bad(f"{place}: blocks of type {str(kind)[:40]!r} are not read here", place)
    if role == "assistant":
        made: dict[str, Any] = {"role": role, "content": "".join(texts)}
        made |= {"tool_calls": calls} if calls else {}
        return [made | ({"reasoning": "".join(thoughts)} if thoughts else {})]
    if len(parts) > len(texts):
        return [*results, {"role": role, "content": parts}]
    return results + ([{"role": role, "content": "\n".join(texts)}] if texts or not results else [])


def _result(block: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a tool gave back: its text as a tool's message, its images as parts of what the user says next, since only users show some."""
    content = block.get("content") or ""
    images = [b for b in content if isinstance(b, dict) and b.get("type") == "image"] if isinstance(content, list) else []
    text = _text([b for b in content if b not in images] if images else content, where)
    shown = [{"type": "image", "source": image.get("source")} for image in images]
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": text}, shown


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("input", {}), dict):
        raise bad(f"{where}: a tool_use needs a name, and an input that is an object", where)
    arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
    return {"id": str(block.get("id") or ""), "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _text(content: Any, where: str) -> str:
    """The text of a content: itself, or of its text blocks."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(b, dict) and b.get("type") == "text" and isinstance(b.get("text"), str) for b in content
    ):
        return "\n".join(block["text"] for block in content)
    raise bad(f"{where}: text is read here, and text blocks only", where)
