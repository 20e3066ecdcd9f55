"""Answers of a given shape as grammars: JSON, schemas, regular expressions, choices, Lark, tool calls; behind the thinking if there is one.

A frame grammar says what stands around the answer (thinking, the tags of a response), and the answer's grammar is a part with a name of its
own, so that nothing a client writes can change the frame.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie45.server.failures import bad
from ernie45.server.protocol import ChatRequest, CompletionRequest, FunctionTool, NamedTool, ResponseFormat, Tool
from ernie45.server.settings import Limits
from ernie45.tokens.tokenizer import Tokenizer

# Compact JSON with one space, as models are used to write it: free white space lets a weak model write nothing else.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Shape:
    """A named part of a grammar: `lark` text or a JSON `schema`; field: the request's field it came from."""

    field: str
    lark: str | None = None
    schema: Mapping[str, Any] | None = None

    def part(self, name: str) -> dict[str, Any]:
        """As llguidance reads it."""
        if self.lark is not None:
            return {"name": name, "lark_grammar": self.lark}
        return {"name": name, "json_schema": {**(self.schema or {}), "x-guidance": _STYLE}}


def shape_of(request: ChatRequest | CompletionRequest, limits: Limits) -> Shape | None:
    """What shape a request's answer must have; None = any. Raises `Failure` 400 when it asks for several, or for one it cannot have."""
    asked = [shape for shape in (_from_format(request.response_format), *_from_guided(request)) if shape is not None]
    if len(asked) > 1:
        raise bad(f"{asked[0].field} and {asked[1].field} both ask for a shape of the answer; give one", asked[1].field)
    if not asked:
        return None
    return checked(asked[0], limits)


def checked(shape: Shape, limits: Limits) -> Shape:
    """The shape, where it is not larger than is taken. Raises `Failure` 400."""
    size = len((shape.lark if shape.lark is not None else json.dumps(shape.schema)).encode())
    if size > limits.schema_bytes:
        raise bad(f"{shape.field} has {size:,} bytes; at most {limits.schema_bytes:,} are taken", shape.field)
    return shape


def _from_format(asked: ResponseFormat | None) -> Shape | None:
    if asked is None or asked.type == "text":
        return None
    field = "response_format"
    if asked.type == "json_object":
        return Shape(field, schema={"type": "object"})
    if asked.type == "json_schema":
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise bad("response_format of type json_schema needs json_schema.schema", "response_format.json_schema")
        return Shape("response_format.json_schema", schema=asked.json_schema.schema_)
    if asked.type == "structural_tag":
        return _structural(asked.structures or [], asked.triggers or [], field)
    value = getattr(asked, asked.type)
    if value is None:
        raise bad(f"response_format of type {asked.type} needs the field {asked.type}", f"response_format.{asked.type}")
    return {"regex": _regex, "choice": _choice, "grammar": _lark}[asked.type](value, f"response_format.{asked.type}")


def _from_guided(request: ChatRequest | CompletionRequest) -> list[Shape | None]:
    """FastDeploy's guided_* and vLLM's structured_outputs."""
    found: list[Shape | None] = []
    inner = request.structured_outputs
    pairs = [("guided_json", request.guided_json, _json), ("guided_regex", request.guided_regex, _regex)]
    pairs += [("guided_choice", request.guided_choice, _choice), ("guided_grammar", request.guided_grammar, _lark)]
    if inner is not None:
        where = "structured_outputs"
        pairs += [(f"{where}.json", inner.json_, _json), (f"{where}.regex", inner.regex, _regex)]
        pairs += [(f"{where}.choice", inner.choice, _choice), (f"{where}.grammar", inner.grammar, _lark)]
        if inner.json_object:
            found.append(Shape(f"{where}.json_object", schema={"type": "object"}))
        if inner.structural_tag is not None:
            found.append(_tag_text(inner.structural_tag, f"{where}.structural_tag"))
    return found + [make(value, field) for field, value, make in pairs if value is not None]


def _json(value: Any, field: str) -> Shape:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise bad(f"{field} is not JSON", field) from None
    if not isinstance(value, dict):
        raise bad(f"{field} must be a JSON schema, an object", field)
    return Shape(field, schema=value)


def _regex(value: str, field: str) -> Shape:
    return Shape(field, lark=f"start: {_pattern(value)}")


def _choice(value: Sequence[str], field: str) -> Shape:
    if not value or not all(value):
        raise bad(f"{field} must hold texts that are not empty", field)
    return Shape(field, lark="start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value))


def _lark(value: str, field: str) -> Shape:
    return Shape(field, lark=value)


def _pattern(regex: str) -> str:
    """A regular expression between slashes."""
    out, escaped = [], False
    for char in regex:
        if char == "/" and not escaped:
            out.append("\\/")
        elif char == "\n":
            out.append("\\n")
        else:
            out.append(char)
        escaped = char == "\\" and not escaped
    return "/" + "".join(out) + "/"


def _tag_text(value: str, field: str) -> Shape:
    try:
        data = json.loads(value)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise bad(f"{field} must be a JSON object with structures and triggers", field)
    return _structural(data.get("structures", []), data.get("triggers", []), field)


def _structural(structures: Any, triggers: Any, field: str) -> Shape:
    """Free text in which each `begin` is followed by JSON of its schema and `end`. Text may hold no trigger outside a structure."""
    well = isinstance(structures, list) and structures and isinstance(triggers, list) and triggers
    if not well or not all(isinstance(item, str) and item for item in triggers):
        raise bad(f"{field} needs structures and triggers, lists that are not empty", field)
    lines = []
    for n, item in enumerate(structures):
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) and item[name] for name in ("begin", "end")):
            raise bad(f"{field}: structures[{n}] needs begin and end, texts that are not empty", field)
        trigger = next((trigger for trigger in triggers if item["begin"].startswith(trigger)), None)
        if trigger is None:
            raise bad(f"{field}: structures[{n}].begin starts with none of the triggers", field)
        schema = item.get("schema", {})
        if not isinstance(schema, dict):
            raise bad(f"{field}: structures[{n}].schema must be an object", field)
        lines += _after_text(
            f"tag{n}", trigger, item["begin"][len(trigger) :], f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}", item["end"]
        )
    tags = " | ".join(f"tag{n}" for n in range(len(structures)))
    return Shape(field, lark="\n".join([f"start: ({tags})* TEXT", "TEXT: /(.|\\n)*/", *lines]))


def _after_text(name: str, trigger: str, rest: str, body: str, end: str) -> list[str]:
    """Rules of text up to a trigger (the first, hence lazy), then what must follow it."""
    words = " ".join(json.dumps(text, ensure_ascii=False) for text in (rest,) if text)
    return [
        f"{name}_begin[lazy]: TEXT {json.dumps(trigger, ensure_ascii=False)}",
        f"{name}: {name}_begin {words} {name}_body {json.dumps(end, ensure_ascii=False)}",
        f"{name}_body: {body}",
    ]


# ---- tool calls


def forced_tools(request: ChatRequest) -> list[FunctionTool]:
    """The functions of which one must be called; empty when none must. Raises `Failure` 400."""
    choice, known = request.tool_choice, [tool.function for tool in request.tools or []]
    if choice in (None, "none", "auto"):
        return []
    if not known:
        raise bad("tool_choice asks for a call, and there are no tools", "tool_choice")
    if choice == "required":
        return known
    assert isinstance(choice, NamedTool)
    named = [function for function in known if function.name == choice.function.name]
    if not named:
        raise bad(f"tool_choice names '{choice.function.name}', which is not among the tools", "tool_choice")
    return named


def call_shape(functions: Sequence[FunctionTool], tags: "Tags", *, several: bool, free: bool) -> Shape:
    """Calls of these functions as the ERNIE formats write them. free: text may stand before and between them, and calls need not come."""
    schema = {"anyOf": [_call_schema(function) for function in functions]}
    opening, closing = tags.word("<tool_call>"), tags.word("</tool_call>")
    body = f"%json {json.dumps({**schema, 'x-guidance': _STYLE})}"
    rules = [f'call: {opening} "\\n" body "\\n" {closing}', f"body: {body}"]
    text = "TEXT: /(.|\\n)*/"
    if not free:
        lines = ['start: call ("\\n" call)*' if several else "start: call", *rules]
    elif tags.single("<tool_call>"):
        lines = ["start: TEXT (call TEXT)*" if several else "start: TEXT (call)?", text, *rules]
    else:
        calls = _after_text("call", "<tool_call>", "\n", body, "\n</tool_call>")
        lines = ["start: call* TEXT" if several else "start: call | TEXT", text, *calls]
    return Shape("tools", lark="\n".join(lines))


def _call_schema(function: FunctionTool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as templates show them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


# ---- frames


class Tags:
    """How a grammar writes the tags of a format: as one id where the vocabulary has it, else as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def single(self, tag: str) -> bool:
        """Whether the tag is one control token, which no text spells."""
        return self._tokenizer.id_of(tag) in self._tokenizer.control_ids

    def word(self, tag: str) -> str:
        """The tag in a Lark rule."""
        return f"<[{self._tokenizer.id_of(tag)}]>" if self.single(tag) else json.dumps(tag)


def framed(shape: Shape, tags: Tags, *, thinking: bool, response: bool) -> str:
    """The whole grammar: thinking up to its closing tag, the tags of a response, and the answer within."""
    answer = "@answer"
    if response:
        answer = f'{tags.word("<response>")} "\\n" @answer "\\n" {tags.word("</response>")}'
    if not thinking and answer == "@answer":
        return json.dumps({"grammars": [shape.part("answer")]})
    lines = [f"start: {answer}"]
    if thinking and tags.single("</think>"):
        lines = [f"start: THOUGHT {tags.word('</think>')} /\\n{{0,2}}/ {answer}", "THOUGHT: /(.|\\n)*/"]
    elif thinking:
        lines = [f"start: thought /\\n{{0,2}}/ {answer}", 'thought[suffix="</think>"]: /(.|\\n)*/']
    return json.dumps({"grammars": [{"name": "frame", "lark_grammar": "\n".join(lines)}, shape.part("answer")]})
