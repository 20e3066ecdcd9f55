"""The known chat formats as a table: how a conversation is written down for each family of models.

A family writes a conversation as segments. A segment is text (never control tokens, whatever it says), a control token (one id, always
from here and never from what people write), or a tag (one id where the vocabulary has it, text where not). Segments of an answer
are what an assistant turn says; the last of them ends it. Newlines and spaces below are part of the formats, character by character.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie45.errors import RequestError, TokenizerError
from ernie45.tokens.messages import Image, Message, Text, Video


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    turn   index of the assistant message this is the answer of; None for everything a model is not to say
    label  for an end token: the name ("eos_token") of the token that is learned in its place
    media  for a placeholder: the part it stands for; `text` is then the form people write, repeated in ids as `media.tokens` ids
    """

    text: str
    kind: Literal["text", "control", "tag"] = "text"
    turn: int | None = None
    trusted: bool = False
    label: str | None = None
    media: Image | Video | None = None


@dataclass(frozen=True)
class Chat:
    """What a family renders: checked messages and settings. `thinking` is resolved to True or False."""

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False
    generate: bool = True
    keep_reasoning: bool = False

    def opens_last(self, index: int) -> bool:
        """Whether message `index` is the answer a training record ends with: written as the prompt for it would have begun."""
        return not self.generate and index == len(self.messages) - 1

    def shows_reasoning(self, index: int) -> bool:
        """Whether the reasoning of message `index` is written: if kept, and for the answer a record ends with."""
        return bool(self.messages[index].reasoning) and (self.keep_reasoning or self.opens_last(index))


@dataclass(frozen=True)
class Family:
    """A chat format.

    thinking   "never", "always", or "switch" (then `thinks` is what None means)
    reply      name of the reply format (`parse.FORMATS`)
    stops      tokens that end an answer, besides the tokenizer's eos
    """

    name: str
    segments: Callable[[Chat], Iterator[Segment]]
    reply: str
    roles: frozenset[str] = frozenset({"system", "user", "assistant"})
    thinking: Literal["never", "always", "switch"] = "never"
    thinks: bool = False
    tools: bool = False
    media: bool = False
    stops: tuple[str, ...] = ()

    def resolve_thinking(self, thinking: bool | int | None) -> bool:
        """Whether to think. A number is a budget of tokens: 0 is off, more is on. Raises RequestError where it cannot be switched."""
        if thinking is not None and (not isinstance(thinking, int) or thinking < 0):
            raise RequestError(f"thinking must be true, false or a budget of tokens, not {thinking!r:.60}", field="thinking")
        if thinking is None:
            return self.thinking == "always" or (self.thinking == "switch" and self.thinks)
        if self.thinking == "never" and thinking:
            raise RequestError(f"models of the chat format '{self.name}' have no thinking; leave thinking out", field="thinking")
        if self.thinking == "always" and not thinking:
            raise RequestError(f"models of the chat format '{self.name}' always think, it cannot be switched off", field="thinking")
        return bool(thinking)

    def check(self, chat: Chat) -> None:
        """Refuses by name what the format cannot say. Raises TokenizerError (a message), RequestError (tools)."""
        if chat.tools and not self.tools:
            raise RequestError(f"models of the chat format '{self.name}' have no tools; leave tools out", field="tools")
        for index, message in enumerate(chat.messages):
            where = f"messages[{index}]"
            if message.role not in self.roles or (message.tool_calls and not self.tools):
                what = "tool_calls" if message.role in self.roles else f"role {message.role}"
                raise TokenizerError(f"{where}: the chat format '{self.name}' has no {what}; it has {', '.join(sorted(self.roles))}")
            if message.media and not self.media:
                raise TokenizerError(f"{where}: holds an image or video; the chat format '{self.name}' is for text only")
            if message.media and message.role != "user":
                raise TokenizerError(f"{where}: holds an image or video; only user messages may, this one is of role {message.role}")
            if message.reasoning and self.thinking == "never":
                raise TokenizerError(f"{where}: has reasoning, which the chat format '{self.name}' cannot write")
            for call in message.tool_calls:
                if not call.valid:
                    raise TokenizerError(f"{where}: the arguments of tool call '{call.name}' are not a JSON object: {call.arguments!r:.80}")


def tools_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tool schemas as the formats write them. Raises RequestError when they are not JSON."""
    try:
        return json.dumps(list(tools), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"tools must be JSON: {error}", field="tools") from error


def _control(text: str, turn: int | None = None, label: str | None = None) -> Segment:
    return Segment(text, "control", turn, label=label)


def _tag(text: str, turn: int | None = None) -> Segment:
    return Segment(text, "tag", turn)


def _block(name: str, content: str, message: Message | None = None, turn: int | None = None) -> Iterator[Segment]:
    """`<name>` newline content newline `</name>`."""
    yield _tag(f"<{name}>", turn)
    yield Segment(f"\n{content}\n", turn=turn, trusted=message is not None and message.trusted)
    yield _tag(f"</{name}>", turn)


def _calls(message: Message, turn: int) -> Iterator[Segment]:
    for call in message.tool_calls:
        name = json.dumps(call.name, ensure_ascii=False)
        yield from _block("tool_call", f'{{"name": {name}, "arguments": {call.arguments}}}', turn=turn)
        yield Segment("\n", turn=turn)


# ---- ERNIE text models (0.3B, 21B, 300B) ---------------------------------------------------------------------------------------

_CLS, _SEP = "<|begin_of_sentence|>", "<|end_of_sentence|>"


def _ernie_text(chat: Chat) -> Iterator[Segment]:
    yield _control(_CLS)
    for index, message in enumerate(chat.messages):
        if message.role == "assistant":
            yield Segment("Assistant: ")
            yield Segment(message.text, turn=index, trusted=message.trusted)
            yield _control(_SEP, turn=index, label="eos_token")  # the model ends with eos: training replaces sep as the label
        else:
            yield Segment("User: " if message.role == "user" else "")
            yield Segment(message.text, trusted=message.trusted)
            yield Segment("\n")
    if chat.generate:
        yield Segment("Assistant: ")


# ---- ChatML --------------------------------------------------------------------------------------------------------------------

_START, _END = "<|im_start|>", "<|im_end|>"


def chatml(default_system: str | None = None) -> Family:
    """ChatML; `default_system` is the system text a model gets when the conversation does not begin with one."""

    def segments(chat: Chat) -> Iterator[Segment]:
        messages = list(enumerate(chat.messages))
        if default_system is not None and chat.messages[0].role != "system":
            messages.insert(0, (-1, Message("system", default_system)))
        for index, message in messages:
            turn = index if message.role == "assistant" else None
            yield _control(_START)
            yield Segment(f"{message.role}\n")
            yield Segment(message.text, turn=turn, trusted=message.trusted)
            yield _control(_END, turn=turn)
            yield Segment("\n")
        if chat.generate:
            yield _control(_START)
            yield Segment("assistant\n")

    return Family("chatml", segments, "plain", stops=(_END,))


# ---- ERNIE-4.5-21B-A3B-Thinking ------------------------------------------------------------------------------------------------


def _ernie_thinking(chat: Chat) -> Iterator[Segment]:
    messages = list(enumerate(chat.messages))
    system = messages.pop(0)[1] if messages[0][1].role == "system" else None
    yield _control(_START)
    yield Segment("system\n")
    if system is not None:
        yield from _block("system_setting", system.text, system)
        yield Segment("\n\n")
    yield from _block("global_setting", "think_mode=True")
    if chat.tools:
        yield Segment("\n\n")
        yield from _block("tool_list", tools_json(chat.tools))
    yield _control(_END)
    yield Segment("\n\n")
    for index, message in messages:
        if message.role == "system":
            raise TokenizerError(f"messages[{index}]: the chat format 'ernie-thinking' takes a system message in first place only")
        if message.role == "assistant":
            yield from _ernie_thinking_answer(chat, index)
            continue
        follows = message.role == "tool" and index > 0 and chat.messages[index - 1].role == "tool"
        if follows:  # results of one round of calls share a user turn
            yield Segment("\n")
        else:
            yield _control(_START)
            yield Segment("user\n")
        if message.role == "tool":
            yield from _block("tool_response", message.text, message)
        else:
            yield Segment(message.text, trusted=message.trusted)
        if not (message.role == "tool" and index + 1 < len(chat.messages) and chat.messages[index + 1].role == "tool"):
            yield _control(_END)
            yield Segment("\n\n")
    if chat.generate:
        yield _control(_START)
        yield Segment("assistant\n")
        yield _tag("<think>")
        yield Segment("\n")


def _ernie_thinking_answer(chat: Chat, index: int) -> Iterator[Segment]:
    message = chat.messages[index]
    yield _control(_START)
    yield Segment("assistant\n")
    if chat.shows_reasoning(index):
        yield _tag("<think>")  # the prompt opens it, so it is not learned
        yield Segment("\n")
        yield Segment(f"{message.reasoning}\n", turn=index)
        yield _tag("</think>", index)
        yield Segment("\n\n", turn=index)
    if message.text or not message.tool_calls:
        yield from _block("response", message.text, message, index)
        yield Segment("\n", turn=index)
    yield from _calls(message, index)
    yield _control(_END, turn=index)
    yield Segment("\n\n")


# ---- ERNIE VL models, and their Thinking sort ----------------------------------------------------------------------------------


def media_segments(part: Image | Video, number: int) -> Iterator[Segment]:
    """How the VL models' prompts hold a picture: its number of its kind, from 1, the markers, and the placeholder between them."""
    word, name = ("Picture", "IMAGE") if isinstance(part, Image) else ("Video", "VIDEO")
    yield Segment(f"{word} {number}:")
    yield _control(f"<|{name}_START|>")
    yield Segment(f"<|{name.lower()}@placeholder|>", "control", media=part)
    yield _control(f"<|{name}_END|>")


def _vl_opening(thinking: bool, break_line: bool) -> Iterator[Segment]:
    """What follows "Assistant: ": an open thinking block, or an empty one."""
    if break_line:
        yield Segment("\n")
    yield _tag("<think>")
    if not thinking:
        yield Segment("\n\n")
        yield _tag("</think>")
        yield Segment("\n\n")
    elif break_line:
        yield Segment("\n")


def _ernie_vl(chat: Chat, break_line: bool) -> Iterator[Segment]:
    """`break_line` is the one difference of VL-Thinking: newlines around the opening `<think>`."""
    yield _control(_CLS)
    counts: dict[type, int] = {Image: 0, Video: 0}
    messages = list(enumerate(chat.messages))
    if messages[0][1].role == "system":
        _, system = messages.pop(0)
        yield Segment(system.text, trusted=system.trusted)
        yield Segment("\n")
    if chat.tools:
        yield from _block("tool_list", tools_json(chat.tools))
        yield Segment("\n")
    for index, message in messages:
        if message.role == "assistant":
            yield from _ernie_vl_answer(chat, index, break_line)
        elif message.role == "system":
            yield Segment(message.text, trusted=message.trusted)
            yield Segment("\n")
        elif message.role == "tool":
            yield Segment("User: ")
            yield from _block("tool_output", message.text, message)
        else:
            yield Segment("User: ")
            for part in message.parts:
                if isinstance(part, Text):
                    yield Segment(part.text, trusted=message.trusted)
                else:
                    counts[type(part)] += 1
                    yield from media_segments(part, counts[type(part)])
    if chat.generate:
        yield Segment("\nAssistant: ")
        yield from _vl_opening(chat.thinking, break_line)


def _ernie_vl_answer(chat: Chat, index: int, break_line: bool) -> Iterator[Segment]:
    message = chat.messages[index]
    yield Segment("\nAssistant: ")
    if chat.shows_reasoning(index):
        yield from _vl_opening(True, break_line)
        lead = "" if break_line else "\n"
        yield Segment(f"{lead}{message.reasoning}\n", turn=index)
        yield _tag("</think>", index)
        yield Segment("\n\n", turn=index)
    elif chat.opens_last(index) and not chat.thinking:
        yield from _vl_opening(False, break_line)
    yield Segment(message.text, turn=index, trusted=message.trusted)
    if message.tool_calls and message.text:
        yield Segment("\n", turn=index)
    yield from _calls(message, index)
    yield _control(_SEP, turn=index, label="eos_token")


_WITH_TOOLS = frozenset({"system", "user", "assistant", "tool"})

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("ernie-text", _ernie_text, "plain"),
        Family("ernie-thinking", _ernie_thinking, "ernie-thinking", _WITH_TOOLS, thinking="always", tools=True, stops=(_END,)),
        Family("ernie-vl", lambda chat: _ernie_vl(chat, False), "think", thinking="switch", thinks=False, media=True),
        Family("ernie-vl-thinking", lambda chat: _ernie_vl(chat, True), "think", _WITH_TOOLS, "switch", True, tools=True, media=True),
        chatml(),
    )
}
