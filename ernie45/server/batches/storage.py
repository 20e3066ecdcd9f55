"""Files and batches for the event loop: everything that touches the disk runs in one thread, one thing at a time."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ernie45.errors import ConfigError
from ernie45.server.batches.database import Database
from ernie45.server.batches.files import Files
from ernie45.server.batches.jobs import Batches
from ernie45.server.failures import Failure

T = TypeVar("T")


class Storage:
    """database, files, batches   for the thread: call their methods by `run`."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises `Failure` 503 or 507 when the folder cannot be used."""
        self.clock = clock
        self.database = Database(folder)
        try:
            self.files = Files(self.database, clock)
            self.batches = Batches(self.database, clock)
        except Failure:
            self.database.close()
            raise
        self._temporary = contextlib.ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="storage")

    @classmethod
    def temporary(cls) -> "Storage":
        """One that is gone with the server."""
        with contextlib.ExitStack() as stack:
            made = cls(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ernie45-files-"))))
            made._temporary = stack.pop_all()
        return made

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """The result of a function that runs in the thread. Raises `Failure` as the function does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args))

    def close(self) -> None:
        """Finishes what runs, and gives the folder free."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.database.close()
        self._temporary.close()


def open_storage(where: str, cache_folder: Path, port: int) -> Storage | Failure:
    """What `--storage` says: a folder, `off`, or `auto`. A failure instead is what the routes answer.

    auto is a folder of the port's own under the cache folder, so that two servers do not meet; trouble with it must not keep a server from
    starting. Raises `ConfigError` when a folder that was named cannot be used.
    """
    if where == "off":
        return Failure(404, "this server keeps no files and runs no batches (--storage off)", code="storage_off")
    try:
        if where == "auto":
            return Storage.temporary() if port == 0 else Storage(cache_folder / "serve" / str(port))
        return Storage(Path(where).expanduser())
    except Failure as failure:
        if where != "auto":
            raise ConfigError(f"--storage {where}: {failure.__cause__ or failure}; name another folder, or off") from None
        return failure
