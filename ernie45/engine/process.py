"""An engine in a process of its own, seen from an asyncio front: start it, talk to it, notice when it is dead or stuck. No tensors here.

The two share a pair of connected sockets that exists nowhere else: there is no port and no file to connect to.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ernie45.engine.request import Request
from ernie45.engine.spawn import Spawned, spawn
from ernie45.engine.wire import (
    Cancel,
    Chosen,
    Embed,
    Embedded,
    EngineInfo,
    EngineSpec,
    FromEngine,
    Grant,
    LoadFailed,
    Loading,
    Planned,
    Ready,
    Refused,
    Stepped,
    Submit,
    Unpacker,
    pack,
)
from ernie45.errors import CheckpointError
from ernie45.models.memory import MemoryPlan

Listener = Callable[[Stepped | Refused | Embedded | Chosen], None]


class EngineDied(Exception):
    """The engine's process ended, or was ended because it stood still."""


class _Link(asyncio.Protocol):
    """Our end of the pair of sockets. take: is given each message; lost: called when the other end is closed, or no longer makes sense."""

    def __init__(self, take: Callable[[FromEngine], None], lost: Callable[[], None]) -> None:
        self._take, self._lost = take, lost
        self._unpacker = Unpacker(FromEngine)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        for message in self._unpacker.feed(data):
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """No more will."""
        self._lost()


class EngineProcess:
    """One engine process. All methods are for the event loop's thread.

    on_message  called for each message about requests
    on_death    called once when the process is gone without having been asked; the text says how
    on_loading  called while it loads: stage, done, total
    on_found    called before it reads weights: the folder of its tokenizer and template, so that both sides may load at a time
    on_planned  called before it reads weights: how many bytes it may take of what it plans; what it raises ends the start
    """

    def __init__(
        self,
        spec: EngineSpec,
        environment: Mapping[str, str],
        *,
        on_message: Listener,
        on_death: Callable[[str], None],
        on_loading: Callable[[str, int, int], None] = lambda stage, done, total: None,
        on_planned: Callable[[MemoryPlan], Awaitable[int]],
        on_found: Callable[[str], None] = lambda folder: None,
        stuck_seconds: float = 300.0,
        spawned: Spawned | None = None,
    ) -> None:
        """environment: of the process, whole. stuck_seconds: without a message while requests run, it is ended.

        spawned: a process that was started ahead, and is this one's from now on.
        """
        self._spec = spec
        self._environment = dict(environment)
        self._on_message = on_message
        self._on_death = on_death
        self._on_loading = on_loading
        self._on_planned, self._on_found = on_planned, on_found
        self._stuck_seconds = stuck_seconds
        self._spawned = spawned
        self._link: asyncio.WriteTransport | None = None
        self._started: asyncio.Future[EngineInfo]
        self._tasks: list[asyncio.Task[None]] = []
        self._alive: set[str] = set()
        self._heard = 0.0
        self._ending = False

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return self._spawned.process.pid if self._spawned is not None else None

    async def start(self) -> EngineInfo:
        """Starts it and waits until it has loaded. Raises `CheckpointError` (what it said), or `EngineDied`."""
        self._spawned = self._spawned or await spawn(self._environment)
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        self._link, _ = await loop.create_connection(lambda: _Link(self._take, self._lost), sock=self._spawned.link)
        self._send(self._spec)
        try:
            info = await self._started
        except BaseException:
            await self.stop()
            raise
        self._heard = loop.time()
        self._tasks.append(loop.create_task(self._watch()))
        return info

    def submit(self, request: Request) -> None:
        """Hands a request over."""
        self._note(request.id)
        self._send(Submit(request))

    def cancel(self, request_id: str) -> None:
        """Ends a request; nothing more is told of it."""
        self._alive.discard(request_id)
        self._send(Cancel(request_id))

    def embed(self, id: str, tokens: tuple[int, ...], adapter: str = "") -> None:
        """Hands a text over; `Embedded` or `Refused` answers."""
        self._note(id)
        self._send(Embed(id, tokens, adapter))

    async def stop(self) -> None:
        """Closes the socket, which ends the process after its step; by force when that takes too long."""
        self._ending = True
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            self._link.close()
        if self._spawned is not None:
            await self._spawned.ended()

    def _note(self, id: str) -> None:
        if not self._alive:
            self._heard = asyncio.get_running_loop().time()
        self._alive.add(id)

    def _send(self, message: Any) -> None:
        if self._link is not None and not self._link.is_closing():
            self._link.write(pack(message))

    def _take(self, message: FromEngine) -> None:
        """A message of the engine, on the loop's own turn: no task is woken for it."""
        if isinstance(message, Stepped):
            for output in message.outputs:
                if output.finish is not None:
                    self._alive.discard(output.request_id)
        elif isinstance(message, Refused | Embedded):
            self._alive.discard(message.id)
        elif not isinstance(message, Chosen):
            self._load(message)
            return
        self._heard = asyncio.get_running_loop().time()
        self._on_message(message)

    def _load(self, message: Loading | Planned | Ready | LoadFailed) -> None:
        if isinstance(message, Loading):
            self._on_loading(message.stage, message.done, message.total)
        elif isinstance(message, Planned):
            self._on_found(message.text_folder)
            self._tasks.append(asyncio.ensure_future(self._grant(message.plan)))
        elif self._started.done():  # who waited for the start has given up
            return
        elif isinstance(message, LoadFailed):
            self._started.set_exception(CheckpointError(message.text))
        else:
            self._started.set_result(message.info)

    async def _grant(self, plan: MemoryPlan) -> None:
        try:
            self._send(Grant(await self._on_planned(plan)))
        except Exception as error:  # noqa: BLE001  it ends the start, whoever refused
            if not self._started.done():
                self._started.set_exception(error)

    def _lost(self) -> None:
        if not self._ending:
            self._tasks.append(asyncio.ensure_future(self._mourn()))

    async def _mourn(self) -> None:
        assert self._spawned is not None
        code = await self._spawned.process.wait()
        if self._started.done():
            await self._die(f"the engine process ended with code {code}")
        else:
            self._started.set_exception(EngineDied(f"the engine ended while loading, with code {code}"))

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._stuck_seconds / 4))
            if self._alive and loop.time() - self._heard > self._stuck_seconds:
                assert self._spawned is not None
                with contextlib.suppress(ProcessLookupError):
                    self._spawned.process.kill()
                await self._die(f"the engine did nothing for {self._stuck_seconds:g} s and was ended")
                return

    async def _die(self, why: str) -> None:
        if not self._ending:
            self._ending = True
            self._alive.clear()
            self._on_death(why)
