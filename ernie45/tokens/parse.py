"""A reply's text -> reasoning, content and tool calls, as it is written.

One scanner walks over tables: a format is a set of blocks, a block says what its text is, which tags lead where, and how many
newlines beside its tags belong to the format and not to the text. Text is fed in pieces of any size; a piece of a tag, and newlines
that may stand before one, are held back until it is clear what they are. Feeding a whole reply is feeding one piece, so streamed and
whole replies agree by construction.

What is done with malformed replies:

* A block that never closes keeps what it holds: reasoning stays reasoning, a response stays content.
* A tag that leads nowhere from where it stands (`</think>` in an answer, `<think>` in the middle of one) is text.
* A tool call that is not JSON before its name is known is given back as content, verbatim with its tags. If the name has already been
  sent, it stays a tool call: its arguments are the raw text as far as written, and `valid` is False. So nothing is lost or taken back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ernie45.errors import RequestError, did_you_mean
from ernie45.tokens.messages import ToolCall
from ernie45.tokens.toolcall import CallScanner

ALL = 1 << 30
"""As a count of newlines: every one."""

_STEP = 1024  # characters scanned at once


class Delta(NamedTuple):
    """A piece of a reply.

    kind "content" or "reasoning": `text` follows what came before.
    kind "tool_call": of call number `index`; `name` is set in the first delta of a call only, `arguments` are to be joined, and
    `valid` is set in the last delta of a call only: whether the joined arguments are a JSON object.
    """

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    index: int = 0
    name: str = ""
    arguments: str = ""
    valid: bool | None = None


@dataclass(frozen=True)
class Reply:
    """A whole reply. `reasoning` is None when the reply has no thinking at all."""

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class Tag:
    """Where a tag leads. `first_only`: it counts only before anything else in its block. `drop` newlines before it are the format's."""

    to: str
    first_only: bool = False
    drop: int = 0


@dataclass(frozen=True)
class Block:
    """What the text of a block is, the tags that count in it, and how many newlines at its beginning are the format's."""

    kind: Literal["content", "reasoning", "call"]
    tags: Mapping[str, Tag] = field(default_factory=dict)
    drop_first: int = 0


@dataclass(frozen=True)
class ReplyFormat:
    """How a family writes replies: blocks by name. `tags` are the tokens a decoder must show for the parser to see them."""

    name: str
    blocks: Mapping[str, Block]

    @property
    def tags(self) -> frozenset[str]:
        """Every tag of the format."""
        return frozenset(tag for block in self.blocks.values() for tag in block.tags)


_THINKING = Block("reasoning", {"<think>": Tag("reasoning", first_only=True), "</think>": Tag("after", drop=1)}, drop_first=1)
_CALL = Block("call", {"</tool_call>": Tag("after")})
_BEGIN = {"<think>": Tag("reasoning", first_only=True)}
_TOOLS = {"<tool_call>": Tag("call", drop=2)}
_RESPONSE = {"<response>": Tag("response", drop=2)}

FORMATS: Mapping[str, ReplyFormat] = {
    made.name: made
    for made in (
        # ERNIE text models, ChatML without thinking: the reply is the answer.
        ReplyFormat("plain", {"content": Block("content")}),
        # ERNIE VL models and their Thinking sort, and the many models that write alike.
        ReplyFormat(
            "think",
            {
                "reasoning": _THINKING,
                "content": Block("content", _BEGIN | _TOOLS),
                "after": Block("content", _TOOLS, drop_first=ALL),
                "call": _CALL,
            },
        ),
        # ERNIE-4.5-21B-A3B-Thinking: the answer stands in a <response> block; text outside blocks is taken as answer too.
        ReplyFormat(
            "ernie-thinking",
            {
                "reasoning": _THINKING,
                "content": Block("content", _BEGIN | _RESPONSE | _TOOLS),
                "after": Block("content", _RESPONSE | _TOOLS, drop_first=ALL),
                "response": Block("content", {"</response>": Tag("after", drop=1)}, drop_first=1),
                "call": _CALL,
            },
        ),
    )
}


def reply_format(name: str) -> ReplyFormat:
    """A format by name. Raises RequestError with the nearest name."""
    if name not in FORMATS:
        raise RequestError(f"'{name}' is not a reply format{did_you_mean(name, FORMATS)}", field="format")
    return FORMATS[name]


class ReplyParser:
    """Turns pieces of a reply's text into deltas. `starts_in` is where the prompt left off: `Prompt.starts_in`."""

    def __init__(self, format: ReplyFormat | str, starts_in: str = "content") -> None:
        self.format = reply_format(format) if isinstance(format, str) else format
        if starts_in not in self.format.blocks:
            raise RequestError(
                f"a reply of format '{self.format.name}' cannot start in '{starts_in}'{did_you_mean(starts_in, self.format.blocks)}",
                field="starts_in",
            )
        self._patterns = {name: _tag_pattern(block.tags) for name, block in self.format.blocks.items()}
        self._openers = {name: _opener_pattern(block.tags) for name, block in self.format.blocks.items()}
        self._held = ""
        self._calls = 0
        self._call: CallScanner | None = None
        self._call_open = ""
        self._enter(starts_in)

    def _enter(self, name: str) -> None:
        self._name = name
        self._block = self.format.blocks[name]
        self._to_drop = self._block.drop_first
        self._at_start = True
        self._call = CallScanner() if self._block.kind == "call" else None
        self._announced = False

    def push(self, text: str) -> list[Delta]:
        """What these further characters settle. Neighbours of the same kind come as one delta."""
        kind = self._block.kind
        if text and kind != "call" and not (self._held or self._to_drop or self._openers[self._name].search(text)):
            self._at_start = False  # most pieces are words within a block: nothing is held, and no tag can begin in them
            return [Delta(kind, text)]
        deltas: list[Delta] = []
        for at in range(0, len(text), _STEP):  # what is held stays short, so that cutting it costs nothing
            self._held += text[at : at + _STEP]
            deltas.extend(self._scan(final=False))
        return _joined(iter(deltas))

    def finish(self) -> list[Delta]:
        """What was held back, once no more text comes."""
        deltas = [*self._scan(final=True)]
        if self._call is not None:
            deltas.extend(self._end_call(""))
            self._call = None
        return _joined(iter(deltas))

    def _scan(self, final: bool) -> Iterator[Delta]:
        while self._held:
            if self._call is not None and not self._call.over:
                self._held = self._call.feed(self._held)
                yield from self._call_delta()
            elif self._to_drop and self._held[0] == "\n":
                kept = self._held.lstrip("\n")
                dropped = min(self._to_drop, len(self._held) - len(kept))
                self._to_drop -= dropped
                self._held = self._held[dropped:]
            elif (found := self._find_tag()) is not None:
                tag = self._block.tags[found.group()]
                before, self._held = self._held[: found.start()], self._held[found.end() :]
                yield from self._leave(before, found.group(), tag)
            else:
                cut = len(self._held) if final else self._safe_length()
                text, self._held = self._held[:cut], self._held[cut:]
                yield from self._emit(text)
                return

    def _find_tag(self) -> re.Match[str] | None:
        for match in self._patterns[self._name].finditer(self._held):
            if not self._block.tags[match.group()].first_only or (self._at_start and match.start() == 0):
                return match
        return None

    def _safe_length(self) -> int:
        """How much of the held text can no longer be part of a tag, or of the newlines before one."""
        tags = self._block.tags
        if not tags:
            return len(self._held)
        cut = len(self._held)
        for start in range(max(0, cut - max(map(len, tags)) + 1), cut):
            rest = self._held[start:]
            if any(tag.startswith(rest) and (not how.first_only or (self._at_start and start == 0)) for tag, how in tags.items()):
                cut = start
                break
        newlines = max(how.drop for how in tags.values())
        while newlines and cut and self._held[cut - 1] == "\n":
            cut, newlines = cut - 1, newlines - 1
        return cut

    def _leave(self, before: str, text: str, tag: Tag) -> Iterator[Delta]:
        for _ in range(tag.drop):
            before = before.removesuffix("\n")
        yield from self._emit(before)
        given_back = self._call is not None and self._call.name is None
        if self._call is not None:
            yield from self._end_call(text)
        if self.format.blocks[tag.to].kind == "call":
            self._call_open = text
        self._enter("content" if given_back else tag.to)
        self._at_start = not given_back

    def _emit(self, text: str) -> Iterator[Delta]:
        if not text:
            return
        self._at_start = False
        self._to_drop = 0
        if self._call is not None:
            self._call.feed_after(text)
            yield from self._call_delta()
        else:
            assert self._block.kind != "call"
            yield Delta(self._block.kind, text)

    def _call_delta(self) -> Iterator[Delta]:
        call = self._call
        assert call is not None
        if call.name is not None:
            name = "" if self._announced else call.name
            arguments = call.take_arguments()
            self._announced = True
            if name or arguments:
                yield Delta("tool_call", index=self._calls, name=name, arguments=arguments)

    def _end_call(self, closing: str) -> Iterator[Delta]:
        call = self._call
        assert call is not None
        call.close()
        if call.name is None:  # nothing was sent yet, so all of it can be given back
            yield Delta("content", self._call_open + call.raw + closing)
            return
        yield from self._call_delta()
        yield Delta("tool_call", index=self._calls, valid=call.valid())
        self._calls += 1


def parse_reply(text: str, format: ReplyFormat | str, starts_in: str = "content") -> Reply:
    """A whole reply at once. Raises RequestError when the format is not known."""
    parser = ReplyParser(format, starts_in)
    return collect([*parser.push(text), *parser.finish()])


def collect(deltas: Iterable[Delta]) -> Reply:
    """The reply that deltas, in order, make up. Calls get no id: the server names them."""
    content, reasoning = "", None
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.kind == "content":
            content += delta.text
        elif delta.kind == "reasoning":
            reasoning = (reasoning or "") + delta.text
        else:
            if delta.index == len(calls):
                calls.append(ToolCall(delta.name, "", valid=False))
            call = calls[delta.index]
            valid = call.valid if delta.valid is None else delta.valid
            calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments, valid=valid)
    return Reply(content, reasoning, tuple(calls))


def _joined(deltas: Iterator[Delta]) -> list[Delta]:
    """Neighbours that continue each other become one delta."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last is not None and last.kind == delta.kind and last.index == delta.index:
            joined[-1] = last._replace(
                text=last.text + delta.text,
                name=last.name + delta.name,
                arguments=last.arguments + delta.arguments,
                valid=delta.valid if last.valid is None else last.valid,
            )
        else:
            joined.append(delta)
    return joined


def _opener_pattern(tags: Mapping[str, Tag]) -> re.Pattern[str]:
    """Finds what could be the beginning of a tag, or of the newlines before one."""
    newline = "\n" if any(tag.drop for tag in tags.values()) else ""
    openers = "".join({re.escape(tag[0]) for tag in tags} | {newline})
    return re.compile(f"[{openers}]" if openers else r"(?!)")


def _tag_pattern(tags: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)) or r"(?!)")
