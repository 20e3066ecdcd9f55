"""Batches and their lines as rows: what is to be done, what came of it, and the files it ends in.

validating -> in_progress -> finalizing -> completed          a line has a result or has none: nothing else is remembered of it, so a
         \\-> failed      \\-> (cancelling) -> cancelled         server that was killed goes on with the lines that have none
                          \\-> expired
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ernie45.server.batches.database import Database
from ernie45.server.batches.files import Part, StoredFile, insert_file
from ernie45.server.batches.input import Fault, Line
from ernie45.server.failures import Failure
from ernie45.server.reply import new_id

Ending = Literal["completed", "expired", "cancelled"]
_LEFT: Mapping[Ending, tuple[str, str]] = {
    "completed": ("internal_error", "The line was lost."),
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
}


@dataclass(frozen=True, kw_only=True)
class Used:
    """Tokens of answers, whichever endpoint counted them."""

    read: int = 0
    cached: int = 0
    written: int = 0
    reasoning: int = 0

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "Used":
        """What an answer's body says under `usage`, in the words of chats, completions and embeddings or in those of responses."""
        usage = answer.get("usage") or {}
        into, out = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
        return cls(
            read=usage.get(f"{into}_tokens", 0),
            cached=usage.get(f"{into}_tokens_details", {}).get("cached_tokens", 0),
            written=usage.get(f"{out}_tokens", 0),
            reasoning=usage.get(f"{out}_tokens_details", {}).get("reasoning_tokens", 0),
        )

    def __add__(self, other: "Used") -> "Used":
        return Used(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "input_tokens": self.read,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.written,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.read + self.written,
        }


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch's row. Times are seconds of the epoch; None = not yet, or never. model: of the first answer; usage: of all, as JSON."""

    seq: int
    id: str
    owner: str
    endpoint: str
    input_file: str
    window: str
    metadata: str
    output_seconds: int | None
    status: str
    errors: str
    created: int
    expires: int
    began: int | None
    finalizing: int | None
    cancelling: int | None
    ended: int | None
    output_file: str | None
    error_file: str | None
    total: int
    completed: int
    failed: int
    model: str | None
    usage: str | None

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        errors = json.loads(self.errors)
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created,
            "in_progress_at": self.began,
            "expires_at": self.expires,
            "finalizing_at": self.finalizing,
            "cancelling_at": self.cancelling,
            **{f"{word}_at": self.ended if self.status == word else None for word in ("completed", "failed", "expired", "cancelled")},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": json.loads(self.metadata),
            "model": self.model,
            "usage": None if self.usage is None else Used(**json.loads(self.usage)).body(),
        }


class Batches:
    """All methods are for the database's thread."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    # ---- what people ask

    def create(
        self, owner: str, file: StoredFile, endpoint: str, hours: int, *, metadata: Mapping[str, str], kept: int | None, most: int
    ) -> Batch:
        """A batch over an uploaded file. kept: seconds its results are kept; most: unfinished ones an owner may have.

        Raises `Failure` 429.
        """
        id, now = new_id("batch_"), int(self._clock())
        [row] = self._database.rows("SELECT COUNT(*) AS alive FROM batches WHERE owner = ? AND ended IS NULL", owner)
        if row["alive"] >= most:
            raise Failure(429, f"{most} batches of this key are not finished; wait for one, or cancel one", code="too_many_batches")
        with self._database.change() as link:
            link.execute(
                "INSERT INTO batches (id, owner, endpoint, input_file, window, metadata, output_seconds, status, created, expires) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (id, owner, endpoint, file.id, f"{hours}h", json.dumps(metadata), kept, now, now + hours * 3600),
            )
        return self.get(id)

    def find(self, id: str, owner: str) -> Batch:
        """An owner's batch. Raises `Failure` 404, for those of others too."""
        found = self._database.rows("SELECT * FROM batches WHERE id = ? AND owner = ?", id, owner)
        if not found:
            raise Failure(404, f"there is no batch '{id[:80]}'", field="id", code="not_found")
        return Batch(**found[0])

    def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Batches of an owner, the newest first; whether there are more. Raises `Failure` 404 for `after`."""
        behind = None if after is None else self.find(after, owner).seq
        rows, more = self._database.page("batches", ["owner = ?"], owner, after=behind, limit=limit, newest=True)
        return [Batch(**row) for row in rows], more

    def cancel(self, id: str, owner: str) -> Batch:
        """Asks for its end. Raises `Failure`: 404, or 409 when it is over."""
        batch = self.find(id, owner)
        if batch.ended is not None:
            raise Failure(409, f"the batch is over: {batch.status}", field="id", code="batch_over")
        if batch.status != "finalizing":
            with self._database.change() as link:
                link.execute(
                    "UPDATE batches SET status = 'cancelling', cancelling = COALESCE(cancelling, ?) WHERE id = ?", (int(self._clock()), id)
                )
        return self.get(id)

    # ---- what the runner does

    def get(self, id: str) -> Batch:
        """A batch that is there."""
        [row] = self._database.rows("SELECT * FROM batches WHERE id = ?", id)
        return Batch(**row)

    def alive(self) -> list[Batch]:
        """Every batch that is not over, the oldest first."""
        return [Batch(**row) for row in self._database.rows("SELECT * FROM batches WHERE ended IS NULL ORDER BY seq")]

    def input_of(self, batch: Batch) -> StoredFile:
        """The file it reads. Raises `Failure` 404."""
        found = self._database.rows("SELECT * FROM files WHERE id = ?", batch.input_file)
        if not found:
            raise Failure(404, f"the file {batch.input_file} is gone", field="input_file_id", code="not_found")
        return StoredFile(**found[0])

    def begin(self, id: str, lines: Sequence[Line]) -> None:
        """The input was read: these are its lines."""
        with self._database.change() as link:
            link.executemany(
                "INSERT INTO lines (batch, number, custom_id, place, size) VALUES (?, ?, ?, ?, ?)",
                [(id, line.number, line.custom_id, line.place, line.size) for line in lines],
            )
            link.execute(
                "UPDATE batches SET status = CASE status WHEN 'validating' THEN 'in_progress' ELSE status END, began = ?, total = ? "
                "WHERE id = ?",
                (int(self._clock()), len(lines), id),
            )

    def fail(self, id: str, faults: Sequence[Fault]) -> None:
        """The input cannot be read: nothing of it runs."""
        errors = json.dumps([fault.body() for fault in faults])
        with self._database.change() as link:
            link.execute("UPDATE batches SET status = 'failed', ended = ?, errors = ? WHERE id = ?", (int(self._clock()), errors, id))

    def todo(self, id: str) -> list[Line]:
        """Lines without a result, in order."""
        found = self._database.rows(
            "SELECT number, custom_id, place, size, tries FROM lines WHERE batch = ? AND ok IS NULL ORDER BY number", id
        )
        return [Line(**row) for row in found]

    def tried(self, id: str, number: int) -> int:
        """Notes that the model broke on a line; how often it has."""
        with self._database.change() as link:
            link.execute("UPDATE lines SET tries = tries + 1 WHERE batch = ? AND number = ?", (id, number))
        [row] = self._database.rows("SELECT tries FROM lines WHERE batch = ? AND number = ?", id, number)
        return row["tries"]

    def settle(self, id: str, number: int, ok: bool, result: str, answer: Mapping[str, Any] | None = None) -> None:
        """A line's result, a line of the output or the error file. What has one already keeps it. answer: the body in it, if one came."""
        with self._database.change() as link:
            done = link.execute(
                "UPDATE lines SET ok = ?, result = ? WHERE batch = ? AND number = ? AND ok IS NULL", (int(ok), result, id, number)
            )
            if done.rowcount:
                column = "completed" if ok else "failed"
                link.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (id,))
            if done.rowcount and ok and answer is not None:
                [row] = link.execute("SELECT usage FROM batches WHERE id = ?", (id,)).fetchall()
                used = Used(**json.loads(row["usage"] or "{}")) + Used.of(answer)
                link.execute(
                    "UPDATE batches SET usage = ?, model = COALESCE(model, ?) WHERE id = ?",
                    (json.dumps(asdict(used)), answer.get("model"), id),
                )

    def finish(self, id: str, ending: Ending) -> None:
        """Writes the output and the error file, in the order of the input, and ends the batch; the lines go. It may be done again."""
        now = int(self._clock())
        if ending == "completed":
            with self._database.change() as link:
                link.execute("UPDATE batches SET status = 'finalizing', finalizing = COALESCE(finalizing, ?) WHERE id = ?", (now, id))
        batch = self.get(id)
        good, bad = Part(self._database), Part(self._database)
        try:
            left = self._write(id, ending, good, bad)
            for part in (good, bad):
                part.settle()
            with self._database.change() as link:
                for part, word in ((good, "output"), (bad, "error")):
                    if part.size:
                        insert_file(link, part, batch.owner, f"{id}_{word}.jsonl", "batch_output", now, batch.output_seconds)
                link.execute(
                    "UPDATE batches SET status = ?, ended = ?, output_file = ?, error_file = ?, failed = failed + ? WHERE id = ?",
                    (ending, now, good.id if good.size else None, bad.id if bad.size else None, left, id),
                )
                link.execute("DELETE FROM lines WHERE batch = ?", (id,))
        except Failure:
            for part in (good, bad):
                part.drop()
            raise
        for part in (good, bad):
            if not part.size:
                part.drop()

    def _write(self, id: str, ending: Ending, good: Part, bad: Part) -> int:
        """Both files' lines; how many had no result."""
        left = 0
        code, message = _LEFT[ending]
        for row in self._database.each("SELECT custom_id, ok, result FROM lines WHERE batch = ? ORDER BY number", id):
            result = row["result"]
            if row["ok"] is None:
                left += 1
                result = result_line(row["custom_id"], None, {"code": code, "message": message})
            (good if row["ok"] else bad).write(result.encode() + b"\n")
        return left


def result_line(custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> str:
    """A line of an output or error file, as OpenAI writes it."""
    return json.dumps({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}, ensure_ascii=False)
