"""Rows of training files, read without conversion: what a row says is found by its keys, and a bad row is named by file, line and field.

| kind | keys of a row |
|---|---|
| ERNIEKit | `src`, `tgt` (lists of turns), optional `system`, `label` (0 keeps a turn from being learned) |
| messages | `messages` (OpenAI's form; `<think>` in an answer is its reasoning), optional `tools` |
| alpaca | `instruction`, `input`, `output`, optional `history`, `system` |
| sharegpt | `conversations` of `from`, `value`, optional `system`, `tools` |
| ERNIEKit preferences | `src`, `tgt`, `response` (two continuations), `sort` (the larger number marks the better) |
| pairs | `prompt`, `chosen`, `rejected` (texts or lists of messages) |
| judged | `prompt`, `completion` (texts or lists of messages), `label` (true: good, false: bad), optional `tools` |
| ERNIEKit pictures | `text_info` (`text`, `tag`), with `image_info`, `video_info`, optional `system`, `tools`, `order` |
| plain text | `text`, or `tgt` alone |

Pictures: parts of messages in OpenAI's form; or `images`, `videos` beside `messages`, `conversations` or `text`, whose texts say `<image>`
and `<video>` where each stands. A relative path is taken from the folder of the file it stands in.

Files: `.jsonl`, `.json` (a list of rows), `.csv` (a header and texts), `.parquet`, `.txt` (the whole file is one text), folders and
patterns of these.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ernie45.errors import DataError, MissingExtra, TokenizerError, did_you_mean
from ernie45.tokens.messages import Message, Text, as_messages
from ernie45.train.picture_rows import Interleaved, Passage, answer, beside, listed_media, put_in_messages, put_in_text, read_interleaved

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
MAX_ROW = 64 << 20
"""Characters of a row; a longer line is no training row but a file of another kind."""


@dataclass(frozen=True)
class Conversation:
    """A conversation whose answers are learned."""

    where: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Preference:
    """A conversation, and two ways it could have gone on. `gap` is how much better the chosen one was judged."""

    where: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    gap: float = 1.0


@dataclass(frozen=True)
class Judgement:
    """A conversation, and an answer to it that was judged good or bad by itself."""

    where: str
    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    good: bool
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Document:
    """A text of which every token is learned."""

    where: str
    text: str


Record = Conversation | Preference | Judgement | Document | Interleaved


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The data files that files, folders and patterns name, in order. Raises DataError for a name that leads to nothing."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        elif any(sign in str(path) for sign in "*?["):
            start = Path(path.anchor) if path.is_absolute() else Path()
            files = sorted(start.glob(str(path.relative_to(start) if path.is_absolute() else path)))
        else:
            files = [path] if path.is_file() else []
        if not files:
            raise DataError(f"{path}: no such file, or a folder or pattern without {', '.join(SUFFIXES)} files")
        for file in files:
            if file.suffix not in SUFFIXES:
                raise DataError(f"{file}: files that end in '{file.suffix}' are not read; allowed: {', '.join(SUFFIXES)}")
        found += files
    return list(dict.fromkeys(found))


def read_records(paths: Sequence[Path], on_bad: Callable[[DataError], None] | None = None) -> Iterator[Record]:
    """Every row of the files in order. A bad row raises DataError, or is handed to `on_bad` and left out."""
    for file in find_files(paths):
        for where, row in _rows(file):
            try:
                yield _beside(as_record(row(), where), file.parent)
            except DataError as error:
                if on_bad is None:
                    raise
                on_bad(error)


def read_weighted(
    paths: Sequence[Path], weights: Sequence[float], seed: int, on_bad: Callable[[DataError], None] | None = None
) -> Iterator[Record]:
    """As `read_records`, each row of `paths[i]` on average `weights[i]` times (once, without weights).

    What a weight has beyond a whole number is given to a share of the rows, chosen by `seed` and the row's place alone. Raises DataError
    for weights that do not fit.
    """
    if not weights:
        yield from read_records(paths, on_bad)
        return
    if len(weights) != len(paths):
        raise DataError(f"weights has {len(weights)} numbers for {len(paths)} names in data; give one for each")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"a weight of data must be a number above 0, not {weight}")
    for path, weight in zip(paths, weights, strict=True):
        for n, record in enumerate(read_records([path], on_bad)):
            drawn = int.from_bytes(hashlib.sha256(f"{seed} {path.name} {n}".encode()).digest()[:8], "little") / 2**64
            for _ in range(int(weight) + (drawn < weight % 1)):
                yield record


def _beside(record: Record, folder: Path) -> Record:
    """The record with its pictures' relative paths taken from `folder` on."""
    if isinstance(record, Document):
        return record
    if isinstance(record, Interleaved):
        return replace(record, passages=tuple(replace(passage, part=beside(passage.part, folder)) for passage in record.passages))

    def placed(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(replace(m, content=tuple(beside(part, folder) for part in m.parts)) if m.media else m for m in messages)

    if isinstance(record, Conversation):
        return replace(record, messages=placed(record.messages))
    return replace(record, prompt=placed(record.prompt))


def _rows(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Where each row stands, and a call that reads it: a row that cannot be read must not end the file."""
    try:
        if file.suffix == ".txt":
            text = file.read_text("utf-8-sig")
            yield str(file), lambda: {"text": text}
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                for row in reader:
                    yield f"{file}: line {reader.line_num}", lambda row=row, line=reader.line_num: _csv_row(row, f"{file}: line {line}")
        elif file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".json":
            data = _parsed(file.read_text("utf-8-sig"), str(file))
            for number, row in enumerate(data if isinstance(data, list) else [data], 1):
                yield f"{file}: row {number}", lambda row=row: row
        else:
            with file.open(encoding="utf-8-sig") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        where = f"{file}: line {number}"
                        yield where, lambda line=line, where=where: _parsed(line, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 at byte {error.start}; convert the file") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise MissingExtra("pyarrow", "train") from None
    try:
        number = 0
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    # a column that only some rows have is null in the others
                    yield f"{file}: row {number}", lambda row=row: {key: value for key, value in row.items() if value is not None}
    except ArrowException as error:
        raise DataError(f"{file}: is no Parquet file that can be read: {error}") from None


def _parsed(text: str, where: str) -> Any:
    if len(text) > MAX_ROW:
        raise DataError(f"{where}: has {len(text):,} characters, more than a row may have ({MAX_ROW:,})")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from None


def _csv_row(row: dict[Any, Any], where: str) -> dict[str, str]:
    if None in row or None in row.values():
        raise DataError(f"{where}: has another number of columns than the header")
    return row


def as_record(row: Any, where: str) -> Record:
    """What a row says. Raises DataError naming `where` and the field."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
    for keys, read in _KINDS:
        if all(key in row for key in keys):
            try:
                return read(row, where)
            except TokenizerError as error:
                raise DataError(f"{where}: {error}") from None
    known = {key for keys, _ in _KINDS for key in keys}
    near = next((hint for key in row if (hint := did_you_mean(str(key), known)).startswith("; did")), "")
    raise DataError(
        f"{where}: its fields ({', '.join(map(str, row)) or 'none'}) are of no known kind{near}; "
        f"known kinds have: {'; '.join(' + '.join(keys) for keys, _ in _KINDS)}"
    )


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = row[key]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: '{key}' must be a list of texts, not {value!r:.60}")
    return value


def _text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a text, not {value!r:.60}")
    return value


def _turns(users: Sequence[str], answers: Sequence[str], learned: Sequence[bool | None]) -> list[Message]:
    messages: list[Message] = []
    for user, said, learn in zip(users, answers, learned, strict=True):
        messages += [Message("user", user), answer(said, learn)]
    return messages


def _system(row: Mapping[str, Any], where: str) -> list[Message]:
    text = _text(row, "system", where, "")
    return [Message("system", text)] if text else []


def _erniekit(row: Mapping[str, Any], where: str) -> Conversation:
    users, answers = _texts(row, "src", where), _texts(row, "tgt", where)
    if len(users) != len(answers) or not users:
        raise DataError(f"{where}: 'src' has {len(users)} turns and 'tgt' has {len(answers)}; they must be as many, and at least one")
    label = row.get("label")
    if label is None:
        label = [1] * len(users)
    if not isinstance(label, list) or len(label) != len(users) or any(item not in (0, 1) for item in label):
        raise DataError(f"{where}: 'label' must hold a 0 or 1 for each of the {len(users)} turns, not {label!r:.60}")
    return Conversation(where, tuple(_system(row, where) + _turns(users, answers, [None if item else False for item in label])))


def _erniekit_preference(row: Mapping[str, Any], where: str) -> Preference:
    users, answers = _texts(row, "src", where), _texts(row, "tgt", where)
    if len(users) != len(answers) + 1:
        raise DataError(f"{where}: 'src' must have one turn more than 'tgt'; they have {len(users)} and {len(answers)}")
    responses, sort = row["response"], row["sort"]
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError(f"{where}: 'response' must hold two continuations")
    if not isinstance(sort, list) or len(sort) != 2 or not all(isinstance(n, int | float) for n in sort) or sort[0] == sort[1]:
        raise DataError(f"{where}: 'sort' must hold two different numbers, not {sort!r:.60}")
    ways = []
    for response in responses:
        turns = [response] if isinstance(response, str) else response
        if not isinstance(turns, list) or len(turns) % 2 == 0 or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{where}: a continuation in 'response' must be an odd number of texts: answer, then user and answer by turns")
        ways.append(tuple(answer(turn) if n % 2 == 0 else Message("user", turn) for n, turn in enumerate(turns)))
    better = 0 if sort[0] > sort[1] else 1
    prompt = [*_system(row, where), *_turns(users[:-1], answers, [False] * len(answers)), Message("user", users[-1])]
    return Preference(where, tuple(prompt), ways[better], ways[1 - better], gap=float(abs(sort[0] - sort[1])))


def _messages(value: Any, where: str, key: str) -> tuple[Message, ...]:
    """Messages in OpenAI's form, with what public data leaves out: ids of tool calls, tool results as JSON, null contents."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: '{key}' must be a list of at least one message")
    plain: list[Any] = []
    pending: list[str] = []
    for n, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {key}[{n}] must be an object with role and content, not {type(message).__name__}")
        message = {name: field for name, field in message.items() if field is not None}
        if message.get("role") == "assistant" and isinstance(message.get("tool_calls"), list):
            calls = message["tool_calls"]
            named = [{"id": f"call_{n}_{i}", **call} if isinstance(call, Mapping) else call for i, call in enumerate(calls)]
            message["tool_calls"] = named
            pending = [str(call["id"]) for call in named if isinstance(call, Mapping)]
        if message.get("role") == "tool":
            if not isinstance(message.get("content"), str):
                message["content"] = json.dumps(message.get("content"), ensure_ascii=False)
            message.setdefault("tool_call_id", pending.pop(0) if pending else "call")
        plain.append(message)
    checked = as_messages([{"content": "", **message} for message in plain])
    return tuple(_split_thinking(message) for message in checked)


def _split_thinking(message: Message) -> Message:
    if message.role == "assistant" and message.reasoning is None and isinstance(message.content, str):
        split = answer(message.content)
        return replace(message, content=split.content, reasoning=split.reasoning)
    return message


def _tools(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of function schemas")
    return tuple(tools)


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    messages = put_in_messages(_messages(row["messages"], where, "messages"), listed_media(row, where), where)
    return Conversation(where, tuple(_system(row, where)) + messages, _tools(row, where))


def _sharegpt(row: Mapping[str, Any], where: str) -> Conversation:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: 'conversations' must be a list of objects with from and value")
    messages = []
    for n, turn in enumerate(turns):
        if turn.get("from") == "function_call":
            raise DataError(
                f"{where}: conversations[{n}] is a function_call, which this form writes as free text; use 'messages' with tool_calls"
            )
        messages.append({"role": roles.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")})
    checked = put_in_messages(_messages(messages, where, "conversations"), listed_media(row, where), where)
    return Conversation(where, tuple(_system(row, where)) + checked, _tools(row, where))


def _alpaca(row: Mapping[str, Any], where: str) -> Conversation:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: 'history' must be a list of pairs of a question and its answer")
    asked = "\n".join(text for text in (_text(row, "instruction", where), _text(row, "input", where, "")) if text)
    users, answers = [*(pair[0] for pair in history), asked], [*(pair[1] for pair in history), _text(row, "output", where)]
    return Conversation(where, tuple(_system(row, where) + _turns(users, answers, [None] * len(users))))


def _side(row: Mapping[str, Any], where: str, key: str, role: Literal["user", "assistant"]) -> tuple[Message, ...]:
    """One side of a comparison: a text, or messages."""
    value = row[key]
    if isinstance(value, str):
        return (answer(value) if role == "assistant" else Message(role, value),)
    return _messages(value, where, key)


def _pair(row: Mapping[str, Any], where: str) -> Preference:
    prompt, chosen, rejected = (
        _side(row, where, key, "user" if key == "prompt" else "assistant") for key in ("prompt", "chosen", "rejected")
    )
    return Preference(where, prompt, chosen, rejected, _tools(row, where))


def _judgement(row: Mapping[str, Any], where: str) -> Judgement:
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise DataError(f"{where}: 'label' must be true (a good answer) or false, not {row['label']!r:.60}")
    sides = _side(row, where, "prompt", "user"), _side(row, where, "completion", "assistant")
    return Judgement(where, *sides, bool(row["label"]), _tools(row, where))


def _document(row: Mapping[str, Any], where: str) -> Document | Interleaved:
    text = _text(row, "text", where) if "text" in row else "".join(_texts(row, "tgt", where))
    if not text:
        raise DataError(f"{where}: its text is empty")
    media = listed_media(row, where)
    if not any(media.values()):
        return Document(where, text)
    return Interleaved(where, tuple(Passage(part, learned=isinstance(part, Text)) for part in put_in_text(text, media, where)))


def _pictures(row: Mapping[str, Any], where: str) -> Interleaved:
    return read_interleaved(row, where, _tools(row, where))


# The first whose keys a row has says what the row is.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Record]], ...] = (
    (("src", "tgt", "response", "sort"), _erniekit_preference),
    (("src", "tgt"), _erniekit),
    (("messages",), _conversation),
    (("conversations",), _sharegpt),
    (("prompt", "chosen", "rejected"), _pair),
    (("prompt", "completion", "label"), _judgement),
    (("instruction", "output"), _alpaca),
    (("text_info",), _pictures),
    (("text",), _document),
    (("tgt",), _document),
)
