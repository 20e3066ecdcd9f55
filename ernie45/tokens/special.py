"""The special tokens a model folder declares, and a splitter that finds whole tokens in text.

Nothing here knows an id or a token by heart: names come from `tokenizer_config.json` and `special_tokens_map.json`, ids from
`added_tokens.json`, `tokenizer.json` or the vocabulary itself. Two sets matter and are kept apart:

* control tokens must never come out of plain text: every token a file declares special, and every added or user-defined token
  written like a tag (`<...>`), for instance `<think>` or `<mask:1>`;
* special tokens are the declared ones; decoding hides them. A tag such as `</think>` may be control without being special.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.errors import CheckpointError, TokenizerError

MAX_FILE_BYTES = 128 * 2**20
"""The largest tokenizer file read, in bytes; the largest in the field are near 35 MB."""

MAX_TOKEN_LENGTH = 512
"""The longest added token accepted, in characters: the splitter's pattern nests no deeper than this."""


@dataclass(frozen=True)
class AddedToken:
    """A token matched as one unit before the vocabulary sees the text. `id` is None where the vocabulary is to say it."""

    text: str
    id: int | None = None
    special: bool = False
    strip_left: bool = False
    strip_right: bool = False
    whole_word: bool = False


@dataclass(frozen=True)
class DeclaredTokens:
    """What the folder's small files say: named tokens ("eos_token" -> "</s>"), every special text, and added tokens by text."""

    named: Mapping[str, str]
    special: frozenset[str]
    added: Mapping[str, AddedToken]


def looks_like_tag(text: str) -> bool:
    """Whether a token is written as a tag, `<...>`; such added tokens never come out of plain text."""
    return len(text) > 2 and text[0] == "<" and text[-1] == ">"


def read_file(path: Path) -> bytes:
    """The bytes of a tokenizer file. Raises CheckpointError when it is missing, unreadable or larger than `MAX_FILE_BYTES`."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; a tokenizer file of more than {MAX_FILE_BYTES:,} is not read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object a file holds. Raises CheckpointError when it is missing, too large, not JSON, or not an object."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but an absent file is an empty object."""
    return read_json_object(path) if path.exists() else {}


def added_token(value: object, where: str, id: int | None = None) -> AddedToken:
    """An added token from its JSON form: a text, or an object with `content` and flags. Raises TokenizerError naming `where`."""
    if isinstance(value, str):
        entry: Mapping[str, Any] = {"content": value, "special": True}
    elif isinstance(value, dict):
        entry = value
    else:
        raise TokenizerError(f"{where} must be a text or an object with 'content', not {value!r:.60}")
    text = entry.get("content")
    if not isinstance(text, str) or not text or len(text) > MAX_TOKEN_LENGTH:
        raise TokenizerError(f"{where} needs a 'content' of 1 to {MAX_TOKEN_LENGTH} characters, not {text!r:.60}")
    return AddedToken(
        text=text,
        id=checked_id(entry["id"], where) if "id" in entry else id,
        special=bool(entry.get("special", False)),
        strip_left=bool(entry.get("lstrip", False)),
        strip_right=bool(entry.get("rstrip", False)),
        whole_word=bool(entry.get("single_word", False)),
    )


def checked_id(value: object, where: str) -> int:
    """A token id from a file: a whole number from 0 to 2^31 - 1. Raises TokenizerError naming `where`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise TokenizerError(f"{where}: a token id must be a whole number from 0 to {2**31 - 1}, not {value!r:.60}")
    return value


def read_declared(folder: Path, from_vocabulary: Iterable[AddedToken] = ()) -> DeclaredTokens:
    """Everything the folder says about added and special tokens; `from_vocabulary` are those `tokenizer.json` lists itself.

    Where files disagree, a token is special if any of them says so. Raises CheckpointError or TokenizerError on damaged files.
    """
    added = {token.text: token for token in from_vocabulary}
    named: dict[str, str] = {}
    special = {token.text for token in added.values() if token.special}
    ids_file = folder / "added_tokens.json"
    for text, id in read_optional(ids_file).items():
        added.setdefault(text, added_token({"content": text}, str(ids_file), checked_id(id, f"{ids_file}: '{text}'")))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        content = read_optional(path)
        for key, value in content.items():
            if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value)) and value:
                named[key] = added_token(value, f"{path}: {key}").text
        listed = content.get("additional_special_tokens") or []
        if not isinstance(listed, list):
            raise TokenizerError(f"{path}: additional_special_tokens must be a list, not {listed!r:.60}")
        special.update(added_token(value, f"{path}: additional_special_tokens").text for value in listed)
        decoder = content.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise TokenizerError(f"{path}: added_tokens_decoder must be an object, not {decoder!r:.60}")
        for id, value in decoder.items():
            where = f"{path}: added_tokens_decoder['{id}']"
            token = added_token(value, where, checked_id(int(id) if id.isdecimal() else id, where))
            added.setdefault(token.text, token)
            if token.special:
                special.add(token.text)
    special.update(named.values())
    return DeclaredTokens(named, frozenset(special), added)


class Splitter:
    """Cuts text at whole tokens: leftmost, then longest. Linear in the text for any set of tokens."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int]]) -> None:
        self._tokens = {token.text: (token, id) for token, id in tokens}
        self._pattern = re.compile(_trie_pattern(self._tokens)) if self._tokens else None

    def split(self, text: str) -> list[str | int]:
        """The text as a sequence of plain pieces (str, never empty) and token ids (int)."""
        if self._pattern is None:
            return [text] if text else []
        parts: list[str | int] = []
        start = 0
        for match in self._pattern.finditer(text):
            token, id = self._tokens[match.group()]
            if token.whole_word and _touches_word(text, match.start(), match.end()):
                continue
            piece = text[start : match.start()]
            piece = piece.rstrip() if token.strip_left else piece
            if piece:
                parts.append(piece)
            parts.append(id)
            start = match.end()
            while token.strip_right and start < len(text) and text[start].isspace():
                start += 1
        if start < len(text):
            parts.append(text[start:])
        return parts


def _touches_word(text: str, start: int, end: int) -> bool:
    before, after = text[max(start - 1, 0) : start], text[end : end + 1]
    return any(c == "_" or c.isalnum() for c in before + after)


def _trie_pattern(words: Iterable[str]) -> str:
    """A pattern that matches the longest of `words`, sharing prefixes so that a thousand tokens cost no more than their length."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _branch_pattern(root)


def _branch_pattern(node: dict[str, Any]) -> str:
    head = ""
    while len(node) == 1 and "" not in node:  # a run without branches: no group, no recursion
        ((char, node),) = node.items()
        head += re.escape(char)
    branches = [re.escape(char) + _branch_pattern(child) for char, child in node.items() if char]
    if not branches:
        return head
    return f"{head}(?:{'|'.join(branches)}){'?' if '' in node else ''}"
