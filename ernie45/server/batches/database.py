"""The disk under files and batches: a folder for one server at a time, an SQLite database in it, and what goes wrong there as failures.

FOLDER/lock         held while a server runs        FOLDER/jobs.sqlite   rows
FOLDER/files/ID     one file's bytes                FOLDER/files/ID.part being written; removed at the start
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ernie45.server.failures import Failure

_VERSION = 2
_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created INTEGER NOT NULL, expires INTEGER
) STRICT;
CREATE INDEX files_of ON files (owner, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, endpoint TEXT NOT NULL, input_file TEXT NOT NULL,
    window TEXT NOT NULL, metadata TEXT NOT NULL, output_seconds INTEGER, status TEXT NOT NULL, errors TEXT NOT NULL DEFAULT '[]',
    created INTEGER NOT NULL, expires INTEGER NOT NULL, began INTEGER, finalizing INTEGER, cancelling INTEGER, ended INTEGER,
    output_file TEXT, error_file TEXT, total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0, model TEXT, usage TEXT
) STRICT;
CREATE INDEX batches_of ON batches (owner, seq);
CREATE TABLE lines (
    batch TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, place INTEGER NOT NULL, size INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0, ok INTEGER, result TEXT, UNIQUE (batch, number), UNIQUE (batch, custom_id)
) STRICT;
"""
_FROM_1 = "ALTER TABLE batches ADD COLUMN model TEXT; ALTER TABLE batches ADD COLUMN usage TEXT;"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Database:
    """One connection, for one thread. Every method may raise `Failure` 507 (disk full) or 503 (damaged, unreadable)."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes it. Raises `Failure` 503 when another server holds the folder or the database is damaged or of a newer version."""
        self.folder = folder
        self.files = folder / "files"
        with guarded():
            self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise unavailable("another server uses the folder for files and batches") from None
        try:
            with guarded():
                self._link = _connected(folder / "jobs.sqlite")
        except Failure:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Gives the folder free."""
        self._link.close()
        os.close(self._lock)

    def rows(self, question: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a SELECT."""
        with guarded():
            return self._link.execute(question, values).fetchall()

    def page(
        self, table: str, conditions: Sequence[str], *values: Any, after: int | None, limit: int, newest: bool
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows in the order they came, or the other way round, from behind the number `after`; whether there are more."""
        if after is not None:
            conditions, values = [*conditions, "seq < ?" if newest else "seq > ?"], (*values, after)
        question = f"SELECT * FROM {table} WHERE {' AND '.join(conditions)} ORDER BY seq {'DESC' if newest else 'ASC'} LIMIT ?"
        found = self.rows(question, *values, limit + 1)
        return found[:limit], len(found) > limit

    def each(self, question: str, *values: Any) -> Iterator[dict[str, Any]]:
        """The rows of a SELECT, one at a time."""
        with guarded():
            yield from self._link.execute(question, values)

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is done inside happens, or nothing."""
        with guarded():
            self._link.execute("BEGIN IMMEDIATE")
            try:
                yield self._link
                self._link.execute("COMMIT")
            except BaseException:
                if self._link.in_transaction:  # a full disk may have ended it already
                    self._link.execute("ROLLBACK")
                raise


def _connected(path: Path) -> sqlite3.Connection:
    """With a write-ahead log and `synchronous` NORMAL: a killed process loses nothing; a power cut the newest results, which come again."""
    new = not path.exists()
    link = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        if new:
            path.chmod(0o600)
        link.execute("PRAGMA journal_mode = WAL")
        link.execute("PRAGMA synchronous = NORMAL")
        (found,) = link.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        (version,) = link.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise unavailable("the database of files and batches was made by a newer version of this program")
        if version == 0:
            link.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version == 1:
            link.executescript(f"BEGIN IMMEDIATE; {_FROM_1} PRAGMA user_version = {_VERSION}; COMMIT;")
    except BaseException:
        link.close()
        raise
    link.row_factory = lambda cursor, row: dict(zip([column[0] for column in cursor.description], row, strict=True))
    return link


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What goes wrong with the disk as a `Failure`: 507 when it is full, else 503. Paths stay in the exception's cause."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a rule of ours, for whoever broke it
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            raise full() from error
        raise unavailable("the server's database of files and batches cannot be used; its operator must look at it") from error
    except OSError as error:
        if error.errno in _FULL:
            raise full() from error
        raise unavailable("the server's folder for files and batches cannot be used; its operator must look at it") from error


def full() -> Failure:
    """507: no room on the disk."""
    return Failure(507, "the server's disk is full; delete files, or ask its operator for room", code="storage_full")


def unavailable(text: str) -> Failure:
    """503: files and batches cannot be served at all."""
    return Failure(503, text, code="storage_unavailable", headers={"Retry-After": "60"})
