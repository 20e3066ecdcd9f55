"""Vocabulary files: plain text -> ids, id -> bytes. One face for `tokenizer.model` (SentencePiece) and `tokenizer.json` (tokenizers).

A vocabulary here sees plain text only. Added and control tokens are cut out before (`special.Splitter`), and a vocabulary is loaded
so that it cannot produce them from text by itself: SentencePiece's user-defined control symbols are marked unused, the added tokens
of a `tokenizer.json` are taken out of it. A space put before the text (dummy prefix) is likewise taken out and left to the
caller, because only the caller knows whether a piece begins the text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from ernie45.errors import CheckpointError, TokenizerError
from ernie45.tokens.special import AddedToken, added_token, looks_like_tag, read_file, read_json_object

Prefix = Literal["none", "always", "unless_space"]
"""Whether a space is put before text that begins a prompt: never, always, or only if there is none yet."""

SPACE_MARK = "\u2581"
"""How SentencePiece writes a space inside a piece."""


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer needs of a vocabulary file.

    encode    plain text (valid Unicode) -> ids; puts no space before it, adds no bos or eos
    ids       token text as the file writes it -> id
    bytes_of  id -> the UTF-8 bytes it stands for; an incomplete character is possible
    prefix    the rule for a space before the text; decoding drops that space again
    control   ids the file itself marks as control symbols;  unknown: the id for text the vocabulary cannot write, if any
    added     the added tokens the file lists
    """

    encode: Callable[[str], list[int]]
    ids: Mapping[str, int]
    bytes_of: Mapping[int, bytes]
    prefix: Prefix
    control: frozenset[int]
    unknown: int | None
    added: tuple[AddedToken, ...] = ()


# ---- SentencePiece -------------------------------------------------------------------------------------------------------------


class PieceKind(IntEnum):
    """`ModelProto.SentencePiece.Type` of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class PieceFile:
    """The parts of a `tokenizer.model` read here: piece texts, their kinds, where each kind's byte lies, and two normaliser flags."""

    texts: list[str]
    kinds: list[int]
    kind_offsets: list[int]
    adds_space: bool = True
    squeezes_spaces: bool = True


def read_pieces(data: bytes, where: str) -> PieceFile:
    """Reads a SentencePiece model file (protobuf `ModelProto`). Raises CheckpointError when it is cut short or not such a file."""
    file = PieceFile([], [], [])
    try:
        for number, value, start in _fields(data, 0, len(data)):
            if number == 1 and isinstance(value, int):
                text, kind, offset = _piece(data, start, value)
                file.texts.append(text)
                file.kinds.append(kind)
                file.kind_offsets.append(offset)
            elif number == 3:
                for inner, content, _ in _fields(data, start, value):
                    file.adds_space = bool(content) if inner == 3 else file.adds_space
                    file.squeezes_spaces = bool(content) if inner == 4 else file.squeezes_spaces
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is not a SentencePiece model, or is damaged: {error}") from error
    if not file.texts:
        raise CheckpointError(f"{where} is not a SentencePiece model: it holds no pieces")
    return file


def _piece(data: bytes, start: int, end: int) -> tuple[str, int, int]:
    """One piece of the file: its text, its kind, and the offset of the byte that holds the kind (-1: absent, so normal)."""
    text_end = start + 2 + data[start + 1]
    if data[start] == 0x0A and data[start + 1] < 0x80 and text_end + 7 == end and data[text_end] == 0x15 and data[text_end + 5] == 0x18:
        return data[start + 2 : text_end].decode(), data[end - 1], end - 1  # text, score, kind: how nearly all are written
    text, kind, offset = "", int(PieceKind.NORMAL), -1
    for number, value, at in _fields(data, start, end):
        if number == 1:
            text = data[at:value].decode()
        elif number == 3:
            kind, offset = value, at
    return text, kind, offset


def _fields(data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """The fields of a protobuf message in data[at:end]: (number, value, offset); value is the end offset for a nested field.

    Raises ValueError when a field passes the end.
    """
    found: list[tuple[int, int, int]] = []
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        start = at
        if wire == 0:
            value, at = _varint(data, at, end)
        elif wire == 2:
            size, start = _varint(data, at, end)
            value = at = start + size
        elif wire in (1, 5):
            value = at = start + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field at byte {start} passes the end of its message at byte {end}")
        found.append((tag >> 3, value, start))
    return found


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:  # nearly always
        return byte, at + 1
    value, shift = 0, 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number at byte {at} does not end")


def read_sentencepiece(path: Path, special: frozenset[str]) -> Vocabulary:
    """A vocabulary from `tokenizer.model`. `special` are the texts the folder declares special.

    Raises CheckpointError (missing, damaged), TokenizerError (a normaliser that squeezes spaces: ids would not give the text back).
    """
    data = read_file(path)
    file = read_pieces(data, str(path))
    if file.squeezes_spaces:
        raise TokenizerError(f"{path} removes repeated spaces (remove_extra_whitespaces), so ids do not give the text back; not supported")
    patched = bytearray(data)
    control = {id for id, kind in enumerate(file.kinds) if kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)}
    for id, (text, kind) in enumerate(zip(file.texts, file.kinds, strict=True)):
        if kind == PieceKind.USER_DEFINED and (text in special or looks_like_tag(text)):
            # SentencePiece would match the symbol inside any text; as an unused piece it can be read but never written.
            patched[file.kind_offsets[id]] = PieceKind.UNUSED
            control.add(id)
    patched += b"\x1a\x02\x18\x00"  # a second normalizer_spec { add_dummy_prefix: false } is merged over the first
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(bytes(patched))
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a SentencePiece model, or is damaged: {error}") from error
    return Vocabulary(
        encode=processor.encode,
        ids={text: id for id, text in reversed(list(enumerate(file.texts)))},
        bytes_of={
            id: _piece_bytes(text, kind == PieceKind.BYTE) for id, (text, kind) in enumerate(zip(file.texts, file.kinds, strict=True))
        },
        prefix="always" if file.adds_space else "none",
        control=frozenset(control),
        unknown=next((id for id, kind in enumerate(file.kinds) if kind == PieceKind.UNKNOWN), None),
    )


def _piece_bytes(text: str, is_byte: bool) -> bytes:
    """The bytes of a SentencePiece-style piece; a byte piece is written `<0xE9>`. Raises CheckpointError when it is not."""
    if not is_byte:
        return text.replace(SPACE_MARK, " ").encode()
    try:
        return bytes.fromhex(text[3:5])
    except ValueError as error:
        raise CheckpointError(f"the vocabulary marks '{text}' as a byte piece; such a piece is written like <0x0A>") from error


# ---- tokenizers ----------------------------------------------------------------------------------------------------------------


def read_tokenizers(path: Path) -> Vocabulary:
    """A vocabulary from `tokenizer.json`. Raises CheckpointError (missing, damaged, hostile), TokenizerError (a decoder not known here)."""
    content = read_json_object(path)
    added = tuple(added_token(entry, f"{path}: added_tokens") for entry in _list(content, "added_tokens", path))
    to_bytes = _decoder(content, path)
    content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    prefix = _take_prefix(content)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises the base class
        raise CheckpointError(f"{path} is not a tokenizer the 'tokenizers' package can read: {error}") from error
    ids = tokenizer.get_vocab(with_added_tokens=False)
    unknown = content["model"].get("unk_token")
    return Vocabulary(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        ids=ids,
        bytes_of={id: to_bytes(text) for text, id in ids.items()},
        prefix=prefix,
        control=frozenset(),
        unknown=ids.get(unknown) if isinstance(unknown, str) else None,
        added=added,
    )


def _list(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: '{key}' must be a list, not {value!r:.60}")
    return value


def _steps(node: object, key: str) -> list[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder as a flat list of its steps."""
    if not isinstance(node, dict):
        return []
    inner = node.get(key)
    return [step for child in inner for step in _steps(child, key)] if isinstance(inner, list) else [node]


def _take_prefix(content: dict[str, Any]) -> Prefix:
    """Finds the rule for a space before the text, and takes it out of `content`."""
    prefix: Prefix = "none"
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE_MARK:
            step["prepend"] = ""
            prefix = "always"
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            if step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never":
                prefix = "unless_space"
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step.get("type") == "ByteLevel":
            if step.get("add_prefix_space", True):
                prefix = "unless_space"
            step["add_prefix_space"] = False
    return prefix


def _decoder(content: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    """How one token's text becomes bytes, from the file's decoder. Raises TokenizerError when the decoder is not known here."""
    kinds = {step.get("type") for step in _steps(content.get("decoder"), "decoders")}
    if "ByteLevel" in kinds:
        return _byte_level()
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        falls_back = "ByteFallback" in kinds
        return lambda text: _piece_bytes(text, falls_back and _is_byte_piece(text))
    named = ", ".join(sorted(str(kind) for kind in kinds)) or "none"
    raise TokenizerError(f"{path}: the decoder ({named}) is not one this reads: ByteLevel, or SentencePiece style with ByteFallback")


def _byte_level() -> Callable[[str], bytes]:
    """A byte-level token's bytes; a character outside the alphabet stands for its own UTF-8."""
    table = byte_level_table()
    latin_1 = str.maketrans({char: byte.decode("latin-1") for char, byte in table.items()})
    outside = re.compile(f"[^{re.escape(''.join(table))}]")

    def to_bytes(text: str) -> bytes:
        if outside.search(text):  # hardly ever: the rest is 100,000 tokens at a start
            return b"".join(table.get(char) or char.encode() for char in text)
        return text.translate(latin_1).encode("latin-1")

    return to_bytes


def _is_byte_piece(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">") and all(c in "0123456789ABCDEFabcdef" for c in text[3:5])


def byte_level_table() -> dict[str, bytes]:
    """Byte-level BPE's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards in order."""
    printable: Sequence[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(256 + n): bytes([byte]) for n, byte in enumerate(hidden)}
