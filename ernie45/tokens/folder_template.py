"""A model folder's own chat template as segments: the sandboxed rendering, cut into control tokens and text.

Two things a plain rendering does not say are found here.

* Which control tokens are the template's and which a stranger wrote into a message. Before rendering, a mark (a private-use character
  that occurs nowhere in the conversation) is put inside every control token in messages and tools; what carries it afterwards is text.
* What an answer is: the `{% generation %}` blocks where the template has them, otherwise what message i adds to the rendering of the
  messages before it with the generation prompt.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie45.errors import CheckpointError, RequestError, TokenizerError
from ernie45.tokens.formats import Segment
from ernie45.tokens.jinja import private_characters, render
from ernie45.tokens.messages import Message, Text
from ernie45.tokens.special import read_file, read_optional
from ernie45.tokens.tokenizer import Tokenizer

_ANSWER_TAGS = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
"""Tags templates look for in an assistant's own content; there they stay as they are."""


@dataclass(frozen=True)
class FolderTemplate:
    """The source of a folder's template and the named tokens it may use ("eos_token", ...)."""

    template: str
    named: Mapping[str, str] = field(default_factory=dict)

    def rendered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Text, and the spans of it that `{% generation %}` blocks wrote. Raises TokenizerError when the template fails or refuses."""
        plain = [{key: value for key, value in message.items() if value not in (None, (), False)} for message in messages]
        return render(self.template, {**self.named, "messages": plain, **variables})

    def text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text only, as `rendered`."""
        return self.rendered(messages, **variables)[0]

    def segments(
        self,
        messages: tuple[Message, ...],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool | int | None,
        generate: bool,
        tokenizer: Tokenizer,
    ) -> list[Segment]:
        """The conversation as segments. Raises TokenizerError (the template refuses it), RequestError (a setting it has no word for)."""
        variables = self._variables(tools, thinking, generate)
        shown = [_as_mapping(message, f"messages[{index}]") for index, message in enumerate(messages)]
        (mark,) = private_characters(repr(shown) + repr(tools) + self.template, 1)
        tokens = sorted((tokenizer.token_of(id) for id in tokenizer.control_ids), key=len, reverse=True)
        guarded = [
            message if messages[index].trusted else _guard(message, mark, tokens, _ANSWER_TAGS if message["role"] == "assistant" else ())
            for index, message in enumerate(shown)
        ]
        if tools:
            variables["tools"] = _guard(list(tools), mark, tokens, ())
        text, generated = self.rendered(guarded, **variables)
        answers = [] if generate else self._answers(guarded, text, generated, variables, tokenizer)
        return list(_cut(text, answers, mark, tokenizer))

    def _variables(self, tools: object, thinking: bool | int | None, generate: bool) -> dict[str, Any]:
        variables: dict[str, Any] = {"add_generation_prompt": generate}
        if tools and "tools" not in self.template:
            raise RequestError("this folder's chat template has no tools; leave tools out", field="tools")
        if thinking is not None:
            words = [word for word in ("enable_thinking", "thinking_mode", "thinking") if word in self.template]
            if not words:
                raise RequestError("this folder's chat template has no switch for thinking; leave thinking out", field="thinking")
            on = bool(thinking)
            variables |= {"enable_thinking": on, "thinking": on, "options": {"thinking_mode": "open" if on else "close"}}
        return variables

    def _answers(
        self,
        messages: list[dict[str, Any]],
        text: str,
        generated: tuple[tuple[int, int], ...],
        variables: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> list[tuple[int, int, int]]:
        """(start, end, message index) of every answer in the text. Raises TokenizerError when they cannot be told apart."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if generated:
            if len(generated) != len(turns):
                raise TokenizerError(f"the folder's chat template marks {len(generated)} generated blocks for {len(turns)} answers")
            return [(start, end, index) for (start, end), index in zip(generated, turns, strict=True)]
        found = []
        for index in turns:
            before = self.text(messages[:index], **{**variables, "add_generation_prompt": True}) if index else ""
            through = self.text(messages[: index + 1], **variables)
            if not (index and through.startswith(before) and text.startswith(through)):
                raise TokenizerError(
                    f"messages[{index}]: what of it is learned cannot be told: the folder's chat template writes messages differently "
                    "once later ones follow; put {% generation %} blocks into the template"
                )
            found.append((len(before), len(before) + _answer_length(through[len(before) :], tokenizer), index))
        return found


def read_folder_template(folder: Path, tokenizer: Tokenizer) -> FolderTemplate | None:
    """The folder's template, or None when it has none: `chat_template.jinja` first, then `chat_template` of `tokenizer_config.json`.

    Of several named templates the one called "default" is taken. Raises CheckpointError on damaged files.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return FolderTemplate(read_file(path).decode(), tokenizer.named)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
    path = folder / "tokenizer_config.json"
    found = read_optional(path).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{path}: chat_template must be a text, not {type(found).__name__}")
    return FolderTemplate(found, tokenizer.named) if found else None


def _as_mapping(message: Message, where: str) -> dict[str, Any]:
    """A message in the form templates expect."""
    if any(not isinstance(part, Text) for part in message.parts):
        raise TokenizerError(f"{where}: images and videos need a known chat format; this folder's template is rendered for text only")
    shown: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.reasoning is not None:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _object(call.arguments, where)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        shown["name"] = message.name
    return shown


def _object(arguments: str, where: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where}: the arguments of a tool call are not a JSON object: {arguments!r:.80}") from error


def _guard(value: Any, mark: str, tokens: Sequence[str], except_for: Sequence[str]) -> Any:
    """The value with the mark put after the first character of every control token in its texts."""
    if isinstance(value, str):
        for token in tokens:
            if token in value and token not in except_for:
                value = value.replace(token, token[0] + mark + token[1:])
        return value
    if isinstance(value, Mapping):
        return {_guard(key, mark, tokens, except_for): _guard(item, mark, tokens, except_for) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, mark, tokens, except_for) for item in value]
    return value


def _answer_length(rest: str, tokenizer: Tokenizer) -> int:
    """How much of what a turn wrote is its answer: up to its last control token; layout after that is not learned."""
    end = at = 0
    for part in tokenizer.split_special(rest):
        at += len(part) if isinstance(part, str) else len(tokenizer.token_of(part))
        end = at if isinstance(part, int) else end
    return end if end and not rest[end:].strip() else len(rest)


def _cut(text: str, answers: Sequence[tuple[int, int, int]], mark: str, tokenizer: Tokenizer) -> Iterator[Segment]:
    edges = [(0, None), *((edge, turn) for start, end, index in answers for edge, turn in ((start, index), (end, None)))]
    for (start, turn), (end, _) in zip(edges, [*edges[1:], (len(text), None)], strict=True):
        for part in tokenizer.split_special(text[start:end]):
            if isinstance(part, int):
                yield Segment(tokenizer.token_of(part), "control", turn)
            else:
                yield Segment(part.replace(mark, ""), "text", turn)
