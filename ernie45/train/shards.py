"""Token shards: a corpus as two flat files that are mapped into memory, not read.

    NAME.tokens   all ids, one document after the other, little-endian uint32
    NAME.ends     where each document ends, little-endian int64, ascending; the last is the number of tokens
    NAME.json     documents, tokens, vocabulary, and SHA-256 of both files

`NAME.json` is written last: a corpus without it is not whole.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ernie45.config import from_mapping
from ernie45.errors import ConfigError, DataError

TOKENS, ENDS = np.dtype("<u4"), np.dtype("<i8")
_BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What `NAME.json` says."""

    documents: int
    tokens: int
    vocabulary: int
    sha256_tokens: str
    sha256_ends: str


@dataclass(frozen=True)
class Corpus:
    """A mapped corpus. `tokens` is uint32, `ends` is int64."""

    path: Path
    facts: CorpusFacts
    tokens: np.ndarray
    ends: np.ndarray

    def document_length(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self.ends, prepend=0)


def write_corpus(
    path: Path, documents: Iterable[Iterable[int]], vocabulary: int, on_document: Callable[[int, int], None] = lambda count, tokens: None
) -> CorpusFacts:
    """Write documents of ids as the corpus `path` (without suffix). `on_document` hears the counts so far.

    Raises DataError for an id outside the vocabulary, an empty document, no document at all, or a corpus that exists.
    """
    if _file(path, "json").exists():
        raise DataError(f"{_file(path, 'json')}: exists; choose another name, or remove the corpus first")
    path.parent.mkdir(parents=True, exist_ok=True)
    ends: list[int] = []
    buffer: list[int] = []
    total = 0
    digest = hashlib.sha256()
    with _file(path, "tokens").open("wb") as file:

        def flush() -> None:
            data = np.array(buffer, dtype=TOKENS).tobytes()
            file.write(data)
            digest.update(data)
            buffer.clear()

        for number, ids in enumerate(documents):
            ids = list(ids)
            if not ids or min(ids) < 0 or max(ids) >= vocabulary:
                what = "is empty" if not ids else f"holds an id outside the vocabulary 0 .. {vocabulary - 1}"
                raise DataError(f"document {number} {what}")
            buffer += ids
            total += len(ids)
            ends.append(total)
            if len(buffer) >= _BUFFER:
                flush()
            on_document(number + 1, total)
        flush()
    if not ends:
        raise DataError("there is not one document to write; is the data empty, or was every row left out?")
    marks = np.array(ends, dtype=ENDS).tobytes()
    _file(path, "ends").write_bytes(marks)
    facts = CorpusFacts(
        documents=len(ends),
        tokens=total,
        vocabulary=vocabulary,
        sha256_tokens=digest.hexdigest(),
        sha256_ends=hashlib.sha256(marks).hexdigest(),
    )
    partial = _file(path, "json.partial")
    partial.write_text(json.dumps(asdict(facts), indent=2) + "\n", "utf-8")
    partial.rename(_file(path, "json"))
    return facts


def open_corpus(path: Path) -> Corpus:
    """Map the corpus `path` (without suffix, or its `.json`). Raises DataError when it is not whole or its parts disagree."""
    path = path.with_suffix("") if path.suffix == ".json" else path
    try:
        facts = from_mapping(CorpusFacts, json.loads(_file(path, "json").read_text("utf-8")), str(_file(path, "json")))
        sizes = _file(path, "tokens").stat().st_size, _file(path, "ends").stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; `ernie pretrain --prepare` writes a corpus") from None
    except (ValueError, ConfigError) as error:
        raise DataError(f"{_file(path, 'json')}: is not what a corpus says of itself: {error}") from None
    if facts.documents < 1 or sizes != (facts.tokens * TOKENS.itemsize, facts.documents * ENDS.itemsize):
        raise DataError(f"{path}: its files have {sizes[0]:,} and {sizes[1]:,} bytes, {path.name}.json says otherwise; write it again")
    tokens = np.memmap(_file(path, "tokens"), TOKENS, "r")
    ends = np.memmap(_file(path, "ends"), ENDS, "r")
    if hashlib.sha256(ends.tobytes()).hexdigest() != facts.sha256_ends:
        raise DataError(f"{_file(path, 'ends')}: is damaged: its digest is not that of {path.name}.json; write the corpus again")
    return Corpus(path, facts, tokens, ends)


def _file(path: Path, suffix: str) -> Path:
    return path.parent / f"{path.name}.{suffix}"
