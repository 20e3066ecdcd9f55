"""Text to calibrate with and text to measure on, from the person's files or from what every Python carries.

The built-in text is Python's own language reference as `help()` shows it (465,000 characters of English in the standard library): every
fourth topic is held out, the others calibrate, without the paragraphs that topics share. It is one kind of text: for a model with a
trade, give text of that trade.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import ConfigError
from ernie45.tokens.tokenizer import Tokenizer

MAX_TEXT = 64_000_000
"""Bytes of a text file that are read."""


@dataclass(frozen=True)
class Reading:
    """A text and where it is from."""

    text: str
    origin: str


def built_in_text(*, held_out: bool) -> Reading:
    """The built-in text of either kind. Raises `ConfigError` where Python was installed without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError("this Python has no help topics to read; give --calibration FILE and --held-out FILE") from None
    parts = {kept: [topics[name] for i, name in enumerate(sorted(topics)) if (i % 4 == 0) == kept] for kept in (True, False)}
    if held_out:
        return Reading("\n\n".join(parts[True]), "Python's help topics (every fourth)")
    known = {_words(paragraph) for topic in parts[True] for paragraph in topic.split("\n\n")}
    fresh = [paragraph for topic in parts[False] for paragraph in topic.split("\n\n") if _words(paragraph) not in known]
    return Reading("\n\n".join(fresh), "Python's help topics (the others)")


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def read_text(path: Path) -> Reading:
    """A text file of the person's. Raises `ConfigError` when it cannot be read, is not UTF-8, or is empty."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT)
        text = data.decode("utf-8-sig", errors="strict" if len(data) < MAX_TEXT else "ignore")
    except OSError as error:
        raise ConfigError(f"the text file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text file {path} is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise ConfigError(f"the text file {path} is empty")
    return Reading(text, str(path.name))


def spread_windows(tokenizer: Tokenizer, reading: Reading, tokens: int, length: int, what: str) -> list[list[int]]:
    """Windows of `length` tokens, evenly spread over the text, at most `tokens` together.

    Raises `ConfigError`, with the numbers, when the text is shorter than what was asked for.
    """
    count = tokens // length
    if count < 1:
        raise ConfigError(f"{tokens} {what} tokens make no window of {length}; ask for at least {length}")
    ids = tokenizer.encode(reading.text)
    whole = len(ids) // length
    if whole < count:
        raise ConfigError(
            f"the {what} text ({reading.origin}) has {len(ids):,} tokens, {count * length:,} are asked for; "
            f"give a longer text, or ask for {whole * length:,}"
        )
    return [list(window_of(ids, (i * whole) // count, length)) for i in range(count)]


def window_of(ids: Sequence[int], number: int, length: int) -> Sequence[int]:
    """Window `number` of the tokens."""
    return ids[number * length : (number + 1) * length]
