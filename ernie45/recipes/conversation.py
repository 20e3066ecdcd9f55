"""A conversation as data: turns, what fits into the context, and the file it is kept in. No screen, no model."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ernie45.config import from_mapping
from ernie45.errors import ConfigError, ErnieError, RequestError

FORMAT = "ernie45-conversation-1"
# The least room that is kept for an answer before old turns are dropped.
ANSWER_ROOM = 256


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `interrupted` marks an answer that was stopped by hand or by a limit before its end.

    images and videos are files that stand in front of the text.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str = ""
    interrupted: bool = False
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """The turns that go to the model, how many were left out, and the length of the prompt they make in tokens."""

    turns: tuple[Turn, ...]
    dropped: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class _File:
    format: str
    model: str
    turns: tuple[Turn, ...]


def fit(turns: Sequence[Turn], count: Callable[[Sequence[Turn]], int], limit: int, max_tokens: int | None) -> Fitted:
    """Drop the oldest exchanges, never the system message nor the last question, until the prompt leaves room for an answer.

    `count` gives the prompt length in tokens; `limit` is the context in tokens; the room is `max_tokens`, or `ANSWER_ROOM` when that is
    None, at most half the context. Raises `RequestError` with the numbers when the last question alone does not fit.
    """
    room = min(ANSWER_ROOM if max_tokens is None else max_tokens, limit // 2)
    head = [turn for turn in turns[:1] if turn.role == "system"]
    body = list(turns[len(head) :])
    dropped = 0
    while True:
        tokens = count([*head, *body])
        if tokens + room <= limit:
            return Fitted((*head, *body), dropped, tokens)
        following = next((i for i, turn in enumerate(body) if i > 0 and turn.role == "user"), None)
        if following is None:
            break
        dropped += following
        body = body[following:]
    if tokens < limit and max_tokens is None:
        return Fitted((*head, *body), dropped, tokens)  # a short answer is better than none
    raise RequestError(
        f"the message makes a prompt of {tokens:,} tokens and the answer is to have {room:,}, but the context of this model is {limit:,}; "
        "shorten the message" + (" or the system message" if head else "") + (" or ask for a shorter answer" if tokens < limit else ""),
        field="prompt",
    )


def save(path: Path, model: str, turns: Sequence[Turn], overwrite: bool = False) -> None:
    """Write the conversation: JSON, or Markdown to read when the name ends in .md. The old file stays whole until the new one is.

    Raises `ConfigError` when the file exists and `overwrite` is off, or cannot be written.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, such as {path / 'chat.json'}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; take another name, or `/save! {path}` to replace it")
    if path.suffix.lower() in (".md", ".markdown"):
        text = _markdown(model, turns)
    else:
        data = {"format": FORMAT, "model": model, "turns": [asdict(turn) for turn in turns]}
        text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path) -> list[Turn]:
    """Read what `save` wrote as JSON, or a bare list of {"role", "content"} messages. Raises `ConfigError` that says what is wrong."""
    path = path.expanduser()
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        hint = "; a .md file is for reading only, load the .json one" if path.suffix.lower() in (".md", ".markdown") else ""
        raise ConfigError(f"{path} is no saved conversation ({error}){hint}") from None
    if isinstance(data, list):
        data = {"format": FORMAT, "model": "", "turns": data}
    try:
        file = from_mapping(_File, data, str(path))
    except ErnieError as error:
        raise ConfigError(f"{path} is no saved conversation: {error}") from None
    if file.format != FORMAT:
        raise ConfigError(f"{path} has the format '{file.format}'; this version reads '{FORMAT}'")
    if any(turn.role == "system" for turn in file.turns[1:]):
        raise ConfigError(f"{path}: a system message may stand only at the start")
    return list(file.turns)


def _markdown(model: str, turns: Sequence[Turn]) -> str:
    names = {"system": "System", "user": "You", "assistant": model}
    parts = []
    for turn in turns:
        shown = "".join(f"![{Path(name).name}](<{name}>)\n\n" for name in turn.images + turn.videos)
        parts.append(f"## {names[turn.role]}\n\n{shown}{turn.content}" + ("\n\n*(interrupted)*" if turn.interrupted else ""))
    return f"# Conversation with {model}\n\n" + "\n\n".join(parts) + "\n"
