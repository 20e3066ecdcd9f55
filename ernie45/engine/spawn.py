"""The engine's process before anybody talks to it: started, and the pair of sockets that leads to it. Cheap to import.

A server starts one ahead, while it still loads its own parts: most of an engine's start is reading its libraries, and the two wait for
different processors.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

FAKE_NAME = "fake"
"""The model that is none, and needs no libraries: see `engine.fake`."""
AHEAD = "ahead"
"""The worker's second argument when it is to load a model's libraries before it is told which model."""
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Spawned:
    """A process, and our end of the only way to it. Closed, it ends the process after its step."""

    process: asyncio.subprocess.Process
    link: socket.socket

    async def ended(self) -> None:
        """Until the process has ended; by force when that takes too long. To be awaited when the way to it is closed."""
        try:
            await asyncio.wait_for(self.process.wait(), _STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


async def spawn(environment: Mapping[str, str], *, ahead: bool = False) -> Spawned:
    """Starts one. environment: of the process, whole. ahead: it will be told what to serve later, and loads libraries meanwhile."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ernie45.engine.worker",
            str(theirs.fileno()),
            *([AHEAD] if ahead else []),
            pass_fds=[theirs.fileno()],
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
        )
    return Spawned(process, ours)
