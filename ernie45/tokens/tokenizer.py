"""Text <-> token ids, whatever file the vocabulary came in, and a stream that turns ids into text as they are generated.

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Hello")            # no bos, no eos; text cannot write control tokens
    stream = tokenizer.stream()
    text = stream.push(ids) + stream.finish()  # what arrives is never half a character

Decoding is defined on bytes: each id stands for fixed bytes, a text is the UTF-8 reading of their concatenation, and a byte sequence
that is not UTF-8 becomes U+FFFD. That makes streaming exact (the pieces joined are the whole) and its cost per id constant.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ernie45.errors import CheckpointError, TokenizerError
from ernie45.tokens.special import (
    AddedToken,
    DeclaredTokens,
    Splitter,
    checked_id,
    looks_like_tag,
    read_declared,
    read_optional,
)
from ernie45.tokens.vocabulary import Vocabulary, read_sentencepiece, read_tokenizers


class Tokenizer:
    """One face over a vocabulary file and the folder's added tokens.

    vocab_size    ids known to the files are below this
    special_ids   ids that decoding hides: declared special, or control symbols of the vocabulary
    control_ids   ids that plain text never produces: the special ones, and added tokens written as tags
    eos_ids       ids that end generation: the tokenizer's eos token, then those of `generation_config.json`
    named         the folder's names for tokens, "eos_token" -> "</s>"
    """

    def __init__(self, vocabulary: Vocabulary, declared: DeclaredTokens, *, rows: int = 0, extra_eos: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self.named: Mapping[str, str] = dict(declared.named)
        ids = dict(vocabulary.ids)
        added = _number_added(declared, vocabulary)
        ids.update({text: id for text, (_, id) in added.items()})
        self._ids = ids
        self._texts = {id: text for text, id in reversed(ids.items())}
        self._bytes = dict(vocabulary.bytes_of) | {id: text.encode() for text, (_, id) in added.items()}
        self.vocab_size = 1 + max(self._texts)
        self._rows = max(rows, self.vocab_size)
        self.special_ids = vocabulary.control | {ids[text] for text in declared.special if text in ids}
        control = {id for text, (_, id) in added.items() if looks_like_tag(text)}
        self.control_ids = frozenset(self.special_ids | control)
        # `vocabulary.unknown` is special, yet text the vocabulary cannot write may well become it.
        self._forbidden = self.control_ids - {vocabulary.unknown}
        self._whole = Splitter(_matchable(added, ids, self.control_ids, self._texts))
        self._plain = Splitter((token, id) for token, id in added.values() if id not in self.control_ids)
        eos = [ids[declared.named["eos_token"]]] if declared.named.get("eos_token") in ids else []
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos, *extra_eos]))

    def encode(self, text: str, allow_special: bool = False, *, start: bool = True) -> list[int]:
        """The ids of a text; no bos or eos is added.

        allow_special  whether control tokens written in the text become their ids; otherwise they are spelled like any text
        start          whether the text begins a prompt; a vocabulary that puts a space before text does so only then

        Raises TokenizerError when `text` is not a str or holds a lone surrogate (it came from bytes that were not UTF-8).
        """
        _check_text(text)
        ids: list[int] = []
        for part in (self._whole if allow_special else self._plain).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_plain(self._with_prefix(part) if start and not ids else part))
        return ids

    def _with_prefix(self, text: str) -> str:
        rule = self._vocabulary.prefix
        return " " + text if rule == "always" or (rule == "unless_space" and not text.startswith(" ")) else text

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._vocabulary.encode(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        # A normaliser can turn look-alikes (full-width brackets) into a control token: spelled a character at a time it cannot.
        ids = [id for char in text for id in self._vocabulary.encode(char)]
        if self._forbidden.isdisjoint(ids):
            return ids
        bad = next(id for id in ids if id in self._forbidden)
        raise TokenizerError(f"this vocabulary spells plain text with the control token '{self._texts[bad]}' (id {bad}); refused")

    def split_special(self, text: str) -> list[str | int]:
        """A text cut at the added and control tokens written in it: plain pieces and ids, nothing encoded yet."""
        return self._whole.split(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; `skip_special` hides special tokens. Raises TokenizerError when an id is out of range."""
        stream = TextStream(self, hide=self.special_ids if skip_special else frozenset())
        return stream.push(ids) + stream.finish()

    def stream(self, keep: Iterable[str] = (), skip_special: bool = True) -> "TextStream":
        """A decoder for ids as they come. `keep` names special tokens to show all the same, as a reply parser's tags."""
        kept = {self._ids[text] for text in keep if text in self._ids}
        return TextStream(self, hide=frozenset(self.special_ids - kept) if skip_special else frozenset())

    def id_of(self, token: str) -> int | None:
        """The id of a token as the files write it, or None."""
        return self._ids.get(token)

    def token_of(self, id: int) -> str:
        """The token of an id as the files write it; empty for a row of the embedding no file names. Raises TokenizerError out of range."""
        self.bytes_of(id)
        return self._texts.get(id, "")

    def bytes_of(self, id: int) -> bytes:
        """The bytes an id stands for; none for a row of the embedding no file names. Raises TokenizerError out of range."""
        if type(id) is not int:  # True and 1.0 would be found under 1
            raise TokenizerError(f"a token id must be an int, not {type(id).__name__} {id!r:.60}")
        found = self._bytes.get(id)
        if found is None and not 0 <= id < self._rows:
            raise TokenizerError(f"token id {id} is out of range; this tokenizer has ids 0 to {self._rows - 1}")
        return found or b""

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding takes away one leading space, the one encoding put there."""
        return self._vocabulary.prefix != "none"


class TextStream:
    """Turns ids into text as they come. Joined, all `push` results and `finish` are exactly `decode` of all the ids.

    A character is held back until its last byte is there, so nothing that was emitted is ever taken back. What counts is the
    Unicode character: a family emoji or an accent made of several characters is emitted character by character.
    """

    def __init__(self, tokenizer: Tokenizer, hide: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hide = hide
        self._begun = b""  # the bytes of a character that is not complete
        self._at_start = tokenizer.drops_first_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that is complete after these ids; may be empty. Raises TokenizerError when an id is out of range."""
        bytes_of, hide, pieces = self._tokenizer.bytes_of, self._hide, [self._begun]
        for id in ids:  # all of them first: an id out of range must leave nothing behind
            piece = bytes_of(id)
            if id not in hide:
                pieces.append(piece)
        data = b"".join(pieces)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._begun = data[used:]
        return self._emit(text)

    def finish(self) -> str:
        """The rest: U+FFFD when the ids end inside a character, else nothing. The stream is then at its beginning again."""
        text = self._emit(self._begun.decode(errors="replace"))
        self._begun = b""
        self._at_start = self._tokenizer.drops_first_space
        return text

    def _emit(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json` if there is one, else `tokenizer.model`, with the folder's added tokens.

    Classes and `auto_map` named in the files are ignored: no code of the folder runs.
    Raises CheckpointError (files missing, damaged or hostile), TokenizerError (contents that contradict each other).
    """
    folder = Path(folder)
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.exists():
        vocabulary = read_tokenizers(fast)
        declared = read_declared(folder, vocabulary.added)
    elif pieces.exists():
        declared = read_declared(folder)
        vocabulary = read_sentencepiece(pieces, declared.special)
    else:
        raise CheckpointError(f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model")
    rows = read_optional(folder / "config.json").get("vocab_size", 0)
    eos = read_optional(folder / "generation_config.json").get("eos_token_id", [])
    where = f"{folder / 'generation_config.json'}: eos_token_id"
    return Tokenizer(
        vocabulary,
        declared,
        rows=rows if isinstance(rows, int) and 0 < rows < 2**31 else 0,
        extra_eos=[checked_id(id, where) for id in (eos if isinstance(eos, list) else [eos]) if id is not None],
    )


def _number_added(declared: DeclaredTokens, vocabulary: Vocabulary) -> dict[str, tuple[AddedToken, int]]:
    """Added tokens with their ids: the file's word, else the vocabulary's. Raises TokenizerError on contradictions."""
    added: dict[str, tuple[AddedToken, int]] = {}
    owner: dict[int, str] = {}
    for text, token in declared.added.items():
        id = vocabulary.ids.get(text) if token.id is None else token.id
        if id is None:
            raise TokenizerError(f"added token '{text}' has no id, neither in added_tokens.json nor in the vocabulary")
        if vocabulary.ids.get(text, id) != id:
            raise TokenizerError(f"added token '{text}' has id {id} in the folder's files, but {vocabulary.ids[text]} in the vocabulary")
        if owner.setdefault(id, text) != text:
            raise TokenizerError(f"added tokens '{owner[id]}' and '{text}' share the id {id}")
        if id in vocabulary.bytes_of and text not in vocabulary.ids:
            raise TokenizerError(f"added token '{text}' has id {id}, which the vocabulary uses for another piece")
        added[text] = (token, id)
    return added


def _matchable(
    added: Mapping[str, tuple[AddedToken, int]], ids: Mapping[str, int], control: frozenset[int], texts: Mapping[int, str]
) -> list[tuple[AddedToken, int]]:
    """Every token `allow_special` may find in text: the added ones, and control tokens of the base vocabulary."""
    found = dict(added)
    for id in control:
        found.setdefault(texts[id], (AddedToken(texts[id], id, special=True), ids[texts[id]]))
    return list(found.values())


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {type(text).__name__}; decode bytes first, text.decode('utf-8')")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "it was read from bytes that are not UTF-8"
        ) from error
