"""Runs batches: validates their input, sends their lines through the server's own routes, keeps each result as soon as it is there.

Lines go behind every request that somebody waits for, and take at most half of the places the model has, so a place is soon free for those.
Batches take turns, line by line.
"""

import asyncio
import os
from collections.abc import Callable
from typing import IO, TypeVar

from starlette.types import ASGIApp

from ernie45.server.access import Caller
from ernie45.server.batches.input import Line, body_bytes, read_input
from ernie45.server.batches.inside import Inside, ask
from ernie45.server.batches.jobs import Batch, Ending, result_line
from ernie45.server.batches.storage import Storage
from ernie45.server.failures import Failure, broken
from ernie45.server.reply import new_id
from ernie45.server.service import Service

T = TypeVar("T")
_TRIES = 3  # of a line on which the model breaks
_LOOK_SECONDS = 10.0  # how often expired files are looked for, and batches that could not go on


class Runner:
    """All methods are for the event loop's thread. callers: who an owner is, or None when its key is gone; then its batches wait."""

    def __init__(self, service: Service, app: ASGIApp, storage: Storage, callers: Callable[[str], Caller | None]) -> None:
        self._service = service
        self._app = app
        self._storage = storage
        self._callers = callers
        self._room = asyncio.Semaphore(max(1, service.settings.engine.max_running // 2))
        self._news = asyncio.Event()
        self._stops: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """There is a new batch."""
        self._news.set()

    def cancel(self, id: str) -> None:
        """A batch is to end; the database says so already."""
        if id in self._stops:
            self._stops[id].set()
        self.wake()

    async def run(self) -> None:
        """Until it is cancelled; then no line is under way any more, and those that were will run again."""
        try:
            while True:
                self._news.clear()
                try:
                    await self._look()
                except Failure as failure:
                    self._note("storage", failure)
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news.wait()
                except TimeoutError:
                    pass
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        await self._storage.run(self._storage.files.expire)
        for batch in await self._storage.run(self._storage.batches.alive):
            caller = self._callers(batch.owner)
            if caller is not None and batch.id not in self._tasks:
                self._tasks[batch.id] = asyncio.ensure_future(self._carried(batch, caller))

    async def _carried(self, batch: Batch, caller: Caller) -> None:
        """One batch, from where it stands to its end. What goes wrong on the way leaves it for the next look."""
        self._stops[batch.id] = asyncio.Event()
        try:
            await self._carry(batch, caller)
        except Failure as failure:
            self._note("storage", failure, batch=batch.id)
        except Exception as error:  # noqa: BLE001  a bug of ours in one batch must not end the others; the log tells
            self._service.journal.note("error", batch=batch.id, error=type(error).__name__)
        finally:
            del self._tasks[batch.id], self._stops[batch.id]

    async def _carry(self, batch: Batch, caller: Caller) -> None:
        batches = self._storage.batches
        if batch.began is None and batch.status == "validating" and not await self._validate(batch):
            return
        ending: Ending = "completed"
        if batch.status != "finalizing":
            ending = await self._until_over(batch, caller)
        await self._storage.run(batches.finish, batch.id, ending)
        done = await self._storage.run(batches.get, batch.id)
        self._service.journal.note(
            "batch", id=batch.id, caller=caller.name, status=done.status, total=done.total, completed=done.completed, failed=done.failed
        )

    async def _validate(self, batch: Batch) -> bool:
        """Reads the input. False when it cannot run; it has failed then."""
        storage, limits = self._storage, self._service.settings.limits
        file = await storage.run(storage.files.open, await storage.run(storage.batches.input_of, batch))
        with file:
            lines, faults = await asyncio.to_thread(read_input, file, batch.endpoint, limits)
        if faults:
            await storage.run(storage.batches.fail, batch.id, faults)
        else:
            await storage.run(storage.batches.begin, batch.id, lines)
        return not faults

    async def _until_over(self, batch: Batch, caller: Caller) -> Ending:
        """Works on it until all is done, its time is over, or it was cancelled."""
        stop = self._stops[batch.id]
        if batch.status == "cancelling":
            return "cancelled"
        working = asyncio.ensure_future(self._work(batch, caller))
        stopping = asyncio.ensure_future(stop.wait())
        left = max(0.0, batch.expires - self._storage.clock())
        try:
            await asyncio.wait([working, stopping], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return "completed"
            return "cancelled" if stop.is_set() else "expired"
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _work(self, batch: Batch, caller: Caller) -> None:
        storage = self._storage
        todo = await storage.run(storage.batches.todo, batch.id)
        file = await storage.run(storage.files.open, await storage.run(storage.batches.input_of, batch))
        with file:
            async with asyncio.TaskGroup() as group:
                for line in todo:
                    await self._room.acquire()
                    group.create_task(self._one(batch, line, file, caller)).add_done_callback(lambda _: self._room.release())

    async def _one(self, batch: Batch, line: Line, file: IO[bytes], caller: Caller) -> None:
        """One line to its result."""
        data = await self._storage.run(os.pread, file.fileno(), line.size, line.place)
        request_id, settle = new_id("req_"), self._storage.batches.settle
        try:
            body = body_bytes(data, self._service.settings.limits)
        except (Failure, KeyError):  # it was well when the batch began: the file on the disk is another now
            error = {"code": "invalid_json_line", "message": "The line changed on the disk after the batch began."}
            await self._patiently(lambda: settle(batch.id, line.number, False, result_line(line.custom_id, None, error)))
            return
        while True:
            answer = await self._answer(batch.endpoint, body, caller, request_id)
            pause = await self._pause(batch, line, answer)
            if pause is None:
                break
            await asyncio.sleep(pause)
        response = {"status_code": answer.status, "request_id": request_id, "body": answer.body}
        result = result_line(line.custom_id, response, None)
        await self._patiently(lambda: settle(batch.id, line.number, answer.status == 200, result, answer.body))

    async def _answer(self, path: str, body: bytes, caller: Caller, request_id: str) -> Inside:
        try:
            return await ask(self._app, path, body, caller, request_id)
        except Exception as error:  # noqa: BLE001  as at the door: a bug in one answer ends that answer
            self._service.journal.note("error", id=request_id, error=type(error).__name__)
            return Inside(500, {}, broken(request_id).openai())

    async def _pause(self, batch: Batch, line: Line, answer: Inside) -> float | None:
        """Seconds after which a line is sent again; None when its answer is final."""
        code = (answer.body.get("error") or {}).get("code") if answer.status != 200 else None
        if answer.status in (429, 503) or code == "queue_timeout":
            return min(5.0, float(answer.headers.get("retry-after", "1")))
        if code == "engine_error":
            tries = await self._patiently(lambda: self._storage.batches.tried(batch.id, line.number))
            return 0.1 if tries < _TRIES else None
        return None

    async def _patiently(self, work: Callable[[], T]) -> T:
        """Work on the disk, again and again until it succeeds: a result waits for room rather than be lost."""
        while True:
            try:
                return await self._storage.run(work)
            except Failure as failure:
                self._note("storage", failure)
                await asyncio.sleep(1.0)

    def _note(self, event: str, failure: Failure, **fields: object) -> None:
        self._service.journal.note(event, code=failure.code, error=str(failure.__cause__ or failure), **fields)
