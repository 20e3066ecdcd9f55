"""Uploaded files and the results of batches: bytes in a folder, a row for each, seen by its owner only."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ernie45.server.batches.database import Database, guarded
from ernie45.server.failures import Failure
from ernie45.server.reply import new_id


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file's row. Times are seconds of the epoch."""

    seq: int
    id: str
    owner: str
    name: str
    purpose: str
    bytes: int
    created: int
    expires: int | None

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Part:
    """A file that is being written; it exists once `Files.keep` has taken it."""

    def __init__(self, database: Database) -> None:
        self.id = new_id("file-")
        self.size = 0
        self._path = database.files / f"{self.id}.part"
        with guarded():
            self._out = open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Raises `Failure` 507 when the disk is full."""
        with guarded():
            self._out.write(data)
        self.size += len(data)

    def settle(self) -> None:
        """Puts it under its name, whole and on the disk."""
        with guarded():
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            self._path.rename(self._path.with_suffix(""))

    def drop(self) -> None:
        """Forgets it, settled or not."""
        with guarded():
            try:
                self._out.close()
            finally:
                self._path.unlink(missing_ok=True)
                self._path.with_suffix("").unlink(missing_ok=True)


class Files:
    """All methods are for the database's thread."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._sweep()

    def _sweep(self) -> None:
        """What a killed server left: parts, and files whose row was never written."""
        known = {row["id"] for row in self._database.rows("SELECT id FROM files")}
        with guarded():
            for path in self._database.files.iterdir():
                if path.name not in known:
                    path.unlink()

    def used(self, owner: str) -> tuple[int, int]:
        """How many files an owner has, and their bytes."""
        [row] = self._database.rows("SELECT COUNT(*) AS files, COALESCE(SUM(bytes), 0) AS bytes FROM files WHERE owner = ?", owner)
        return row["files"], row["bytes"]

    def keep(self, part: Part, owner: str, name: str, purpose: str, seconds: int | None) -> StoredFile:
        """A part becomes a file. seconds: how long it is kept; None = until it is deleted."""
        try:
            part.settle()
            with self._database.change() as link:
                insert_file(link, part, owner, name, purpose, int(self._clock()), seconds)
        except Failure:
            part.drop()
            raise
        return self.find(part.id, owner)

    def find(self, id: str, owner: str) -> StoredFile:
        """An owner's file. Raises `Failure` 404, for those of others too."""
        found = self._database.rows(
            "SELECT * FROM files WHERE id = ? AND owner = ? AND (expires IS NULL OR expires > ?)", id, owner, self._clock()
        )
        if not found:
            raise Failure(404, f"there is no file '{id[:80]}'", field="id", code="not_found")
        return StoredFile(**found[0])

    def open(self, file: StoredFile) -> Any:
        """The file's bytes, to be read and closed. Raises `Failure` 503 when they are gone from the disk."""
        with guarded():
            return open(self._database.files / file.id, "rb")

    def page(
        self, owner: str, *, after: str | None, limit: int, newest: bool = True, purpose: str | None = None
    ) -> tuple[list[StoredFile], bool]:
        """Files of an owner in the order they came, or the other way round; whether there are more. Raises `Failure` 404 for `after`."""
        conditions, values = ["owner = ?", "(expires IS NULL OR expires > ?)"], [owner, self._clock()]
        if purpose is not None:
            conditions.append("purpose = ?")
            values.append(purpose)
        behind = None if after is None else self.find(after, owner).seq
        rows, more = self._database.page("files", conditions, *values, after=behind, limit=limit, newest=newest)
        return [StoredFile(**row) for row in rows], more

    def delete(self, id: str, owner: str) -> None:
        """Raises `Failure`: 404, or 409 while a batch reads the file."""
        self.find(id, owner)
        readers = self._database.rows("SELECT id FROM batches WHERE input_file = ? AND ended IS NULL", id)
        if readers:
            raise Failure(409, f"the batch {readers[0]['id']} still reads this file; cancel it first", field="id", code="file_in_use")
        self._forget([id])

    def expire(self) -> None:
        """Removes the files whose time is over, except those that a batch reads."""
        old = self._database.rows(
            "SELECT id FROM files WHERE expires <= ? AND id NOT IN (SELECT input_file FROM batches WHERE ended IS NULL)", self._clock()
        )
        self._forget([row["id"] for row in old])

    def _forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            with self._database.change() as link:
                link.execute("DELETE FROM files WHERE id = ?", (id,))
            with guarded():
                (self._database.files / id).unlink(missing_ok=True)


def insert_file(link: Any, part: Part, owner: str, name: str, purpose: str, now: int, seconds: int | None) -> None:
    """The row of a settled part, inside a transaction."""
    link.execute(
        "INSERT INTO files (id, owner, name, purpose, bytes, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (part.id, owner, name, purpose, part.size, now, None if seconds is None else now + seconds),
    )
