"""An engine in a process of its own, seen from an asyncio front: start it, talk to it, notice when it is dead or stuck. No tensors here.

The two share a pair of connected sockets that exists nowhere else: there is no port and no file to connect to.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ernie45.engine.request import Request
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

_READ = 1 << 20
_STOP_SECONDS = 5.0

Listener = Callable[[Stepped | Refused | Embedded | Chosen], None]


class EngineDied(Exception):
    """The engine's process ended, or was ended because it stood still."""


class EngineProcess:
    """One engine process. All methods are for the event loop's thread.

    on_message  called for each message about requests
    on_death    called once when the process is gone without having been asked; the text says how
    on_loading  called while it loads: stage, done, total
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
        stuck_seconds: float = 300.0,
    ) -> None:
        """environment: of the process, whole. stuck_seconds: without a message while requests run, it is ended."""
        self._spec = spec
        self._environment = dict(environment)
        self._on_message = on_message
        self._on_death = on_death
        self._on_loading = on_loading
        self._on_planned = on_planned
        self._stuck_seconds = stuck_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._alive: set[str] = set()
        self._heard = 0.0
        self._ending = False

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        """Starts it and waits until it has loaded. Raises `CheckpointError` (what it said), or `EngineDied`."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ernie45.engine.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(self._spec)
        unpacker = Unpacker(FromEngine)
        while data := await self._read(reader):
            for message in unpacker.feed(data):
                if isinstance(message, Loading):
                    self._on_loading(message.stage, message.done, message.total)
                elif isinstance(message, Planned):
                    try:
                        self._send(Grant(await self._on_planned(message.plan)))
                    except BaseException:
                        await self.stop()
                        raise
                elif isinstance(message, LoadFailed):
                    await self.stop()
                    raise CheckpointError(message.text)
                elif isinstance(message, Ready):
                    loop = asyncio.get_running_loop()
                    self._heard = loop.time()
                    self._tasks = [loop.create_task(self._listen(reader, unpacker)), loop.create_task(self._watch())]
                    return message.info
        raise EngineDied(f"the engine ended while loading, with code {await self._process.wait()}")

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
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()

    def _note(self, id: str) -> None:
        if not self._alive:
            self._heard = asyncio.get_running_loop().time()
        self._alive.add(id)

    def _send(self, message: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(_READ)
        except ConnectionError:
            return b""

    async def _listen(self, reader: asyncio.StreamReader, unpacker: Unpacker) -> None:
        while data := await self._read(reader):
            self._heard = asyncio.get_running_loop().time()
            for message in unpacker.feed(data):
                if isinstance(message, Stepped):
                    self._alive.difference_update(output.request_id for output in message.outputs if output.finish is not None)
                elif isinstance(message, Refused | Embedded):
                    self._alive.discard(message.id)
                self._on_message(message)
        assert self._process is not None
        await self._die(f"the engine process ended with code {await self._process.wait()}")

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._stuck_seconds / 4))
            if self._alive and loop.time() - self._heard > self._stuck_seconds:
                assert self._process is not None
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._die(f"the engine did nothing for {self._stuck_seconds:g} s and was ended")
                return

    async def _die(self, why: str) -> None:
        if not self._ending:
            self._ending = True
            self._alive.clear()
            self._on_death(why)
