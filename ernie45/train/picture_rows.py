"""Rows with pictures and videos, read without conversion: ERNIEKit's lists of texts and pictures, and messages whose texts hold `<image>`.

ERNIEKit's row is an ordered list of texts, `text_info`, each with a tag: `mask` is only read, `no_mask` is learned. A picture of
`image_info` or `video_info` stands before the text of its `matched_text_index`; where images and videos stand before the same text, `order`
says which comes first, else images do. Addresses are paths, from the folder of the file of rows on, or `data:` addresses.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie45.errors import DataError
from ernie45.tokens.messages import Image, Message, Part, Text, Video

_WORD = re.compile(r"<(image|video)>")
_KINDS: dict[str, type[Image] | type[Video]] = {"image": Image, "video": Video}


@dataclass(frozen=True)
class Passage:
    """A text, picture or video of an interleaved row; `learned` texts are what the model is to say."""

    part: Part
    learned: bool = False


@dataclass(frozen=True)
class Interleaved:
    """Texts, pictures and videos in the order in which they are seen."""

    where: str
    passages: tuple[Passage, ...]
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_conversation(self) -> bool:
        """Whether it begins with what is only read and ends with what is learned."""
        return bool(self.passages) and not self.passages[0].learned and self.passages[-1].learned

    def messages(self) -> tuple[Message, ...]:
        """The same as a conversation: what is only read is a user's, what is learned the model's answer. Raises DataError."""
        if not self.is_conversation:
            raise DataError(
                f"{self.where}: as a conversation 'text_info' begins with a text of tag mask (the question) and ends with one of no_mask "
                "(the answer); rows of another order are for `ernie pretrain`"
            )
        messages = [Message("system", self.system)] if self.system else []
        for learned, group in _runs(self.passages):
            if learned:
                messages.append(answer("".join(passage.part.text for passage in group if isinstance(passage.part, Text))))
            else:
                messages.append(Message("user", tuple(passage.part for passage in group)))
        return tuple(messages)


def answer(text: str, learned: bool | None = None) -> Message:
    """An assistant message; a leading `<think>` block is its reasoning."""
    if text.startswith("<think>") and "</think>" in text:
        reasoning, _, content = text.removeprefix("<think>").partition("</think>")
        return Message("assistant", content.lstrip("\n"), reasoning=reasoning.strip("\n"), learned=learned)
    return Message("assistant", text, learned=learned)


def _runs(passages: Sequence[Passage]) -> Iterator[tuple[bool, list[Passage]]]:
    """Neighbours of one side of the conversation, together. A picture is the user's."""
    run: list[Passage] = []
    for passage in passages:
        if run and passage.learned != run[0].learned:
            yield run[0].learned, run
            run = []
        run.append(passage)
    if run:
        yield run[0].learned, run


def read_interleaved(row: Mapping[str, Any], where: str, tools: tuple[Mapping[str, Any], ...]) -> Interleaved:
    """ERNIEKit's row of `text_info` with `image_info` or `video_info`. Raises DataError naming the field."""
    texts = row["text_info"]
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where}: 'text_info' must be a list of at least one text with its tag")
    before: dict[int, list[Part]] = {}
    for at, part in _ordered(row, where, len(texts)):
        before.setdefault(at, []).append(part)
    passages: list[Passage] = []
    for n, entry in enumerate(texts):
        text, learned = _tagged(entry, f"{where}: text_info[{n}]")
        passages += [Passage(part) for part in before.get(n, ())]
        if text:
            passages.append(Passage(Text(text), learned))
    passages += [Passage(part) for part in before.get(len(texts), ())]
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise DataError(f"{where}: 'system' must be a text, not {system!r:.60}")
    return Interleaved(where, tuple(passages), system, tools)


def _tagged(entry: object, where: str) -> tuple[str, bool]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise DataError(f"{where} must be an object with 'text' and 'tag', not {entry!r:.60}")
    for name in ("tool_calls", "tool_response"):
        if entry.get(name):
            raise DataError(f"{where} has '{name}', which is not read in this form; write the row as 'messages' with tool calls")
    tag = entry.get("tag", "mask")
    if tag not in ("mask", "no_mask"):
        raise DataError(f"{where}: 'tag' must be mask (only read) or no_mask (learned), not {tag!r:.40}")
    return entry["text"], tag == "no_mask"


def _ordered(row: Mapping[str, Any], where: str, count: int) -> Iterator[tuple[int, Part]]:
    """Each picture with the number of the text it stands before, in the order in which those of one place are seen."""
    found = {kind: list(_media(row, kind, where, count)) for kind in _KINDS}
    order = row.get("order")
    if order is None:
        yield from (pair for kind in _KINDS for pair in found[kind])
        return
    kinds, places = (order.get("type"), order.get("index")) if isinstance(order, Mapping) else (None, None)
    if not isinstance(kinds, list) or not isinstance(places, list) or len(kinds) != len(places):
        raise DataError(f"{where}: 'order' must hold the lists 'type' and 'index', equally long")
    for kind, place in zip(kinds, places, strict=True):
        if kind == "text":
            continue
        if kind not in found or not isinstance(place, int) or not 0 <= place < len(found[kind]):
            raise DataError(f"{where}: 'order' speaks of {kind} {place!r:.20}, which the row does not have")
        yield found[kind][place]
    told = sum(kind != "text" for kind in kinds)
    if told != sum(map(len, found.values())):
        raise DataError(f"{where}: 'order' places {told} pictures and videos, and the row has {sum(map(len, found.values()))}")


def _media(row: Mapping[str, Any], kind: str, where: str, count: int) -> Iterator[tuple[int, Part]]:
    entries = row.get(f"{kind}_info") or []
    if not isinstance(entries, list):
        raise DataError(f"{where}: '{kind}_info' must be a list, not {type(entries).__name__}")
    for n, entry in enumerate(entries):
        here = f"{where}: {kind}_info[{n}]"
        if not isinstance(entry, Mapping):
            raise DataError(f"{here} must be an object with matched_text_index and image_url, not {entry!r:.60}")
        at = entry.get("matched_text_index", 0)
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= count:
            raise DataError(f"{here}: 'matched_text_index' must be a number from 0 to {count} (the texts of the row), not {at!r:.40}")
        address = entry.get("image_url", entry.get("video_url"))
        if not isinstance(address, str) or not address:
            raise DataError(f"{here}: 'image_url' must be a path or a data: address, not {address!r:.60}")
        yield at, _KINDS[kind](source=address)


def listed_media(row: Mapping[str, Any], where: str) -> dict[str, list[Part]]:
    """The addresses in `images` and `videos` (or `image`, `video`) of a row, by kind. Raises DataError naming the field."""
    found: dict[str, list[Part]] = {}
    for kind, make in _KINDS.items():
        name = f"{kind}s" if row.get(f"{kind}s") is not None else kind
        given = row.get(name)
        addresses = [given] if isinstance(given, str) else given or []
        if not isinstance(addresses, list) or not all(isinstance(address, str) and address for address in addresses):
            raise DataError(f"{where}: '{name}' must be a list of paths or data: addresses, not {given!r:.60}")
        found[kind] = [make(source=address) for address in addresses]
    return found


def put_in_messages(messages: Sequence[Message], media: Mapping[str, Sequence[Part]], where: str) -> tuple[Message, ...]:
    """Messages with the listed media in place of the words `<image>` and `<video>`; where no word is, in front of the first question.

    Without listed media the words are text. Raises DataError when words and media do not meet.
    """
    if not any(media.values()):
        return tuple(messages)
    left = {kind: list(parts) for kind, parts in media.items()}
    if not any(_WORD.search(message.text) for message in messages if message.role == "user"):
        first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise DataError(f"{where}: has pictures, and no user message that could hold them")
        opened = replace(messages[first], content=(*left["image"], *left["video"], *messages[first].parts))
        return (*messages[:first], opened, *messages[first + 1 :])
    made = [
        replace(message, content=tuple(_put(message.parts, left, where))) if message.role == "user" else message for message in messages
    ]
    _check_all_placed(left, where)
    return tuple(made)


def put_in_text(text: str, media: Mapping[str, Sequence[Part]], where: str) -> tuple[Part, ...]:
    """A text with the listed media in place of its words; where it has none, in front of it. Raises DataError as `put_in_messages`."""
    left = {kind: list(parts) for kind, parts in media.items()}
    if not _WORD.search(text):
        return (*left["image"], *left["video"], *([Text(text)] if text else []))
    parts = tuple(_put([Text(text)], left, where))
    _check_all_placed(left, where)
    return parts


def _put(parts: Sequence[Part], left: dict[str, list[Part]], where: str) -> Iterator[Part]:
    for part in parts:
        if not isinstance(part, Text):
            yield part
            continue
        pieces = _WORD.split(part.text)
        for n, piece in enumerate(pieces):
            if n % 2 == 0:
                if piece:
                    yield Text(piece)
            elif not left[piece]:
                raise DataError(f"{where}: has more words <{piece}> than entries in '{piece}s'")
            else:
                yield left[piece].pop(0)


def _check_all_placed(left: Mapping[str, Sequence[Part]], where: str) -> None:
    for kind, rest in left.items():
        if rest:
            raise DataError(f"{where}: '{kind}s' has {len(rest)} entries more than the texts have words <{kind}>")


def beside(part: Part, folder: Path) -> Part:
    """A part whose relative path is taken from `folder` on."""
    if isinstance(part, Text) or not part.source or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", part.source):
        return part
    return replace(part, source=str(folder / Path(part.source).expanduser()))
