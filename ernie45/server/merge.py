"""The pieces of several answers in the order in which they come."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import NamedTuple

from ernie45.server.stream import Outlet
from ernie45.server.ticket import Piece, Ticket


class Merged(NamedTuple):
    """A piece of answer `index`; None when that answer is over."""

    index: int
    ticket: Ticket
    piece: Piece | None


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[Merged]:
    """All pieces of all answers, and the end of each. Raises `Failure` when one of them fails."""
    if len(tickets) == 1:  # the usual case, without tasks
        while (piece := await tickets[0].next()) is not None:
            yield Merged(0, tickets[0], piece)
        yield Merged(0, tickets[0], None)
        return
    reading = {asyncio.ensure_future(ticket.next()): index for index, ticket in enumerate(tickets)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: reading[task]):
                index = reading.pop(task)
                piece = task.result()
                yield Merged(index, tickets[index], piece)
                if piece is not None:
                    reading[asyncio.ensure_future(tickets[index].next())] = index
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def as_events(tickets: Sequence[Ticket], write: Callable[[Merged], list[bytes]], outlet: Outlet) -> AsyncIterator[bytes]:
    """All that `merged` gives, as `write` says it in events. Raises as it does.

    Pieces that come while the outlet is ready and everything before them is out go there at once, and nobody is woken.
    """
    for index, ticket in enumerate(tickets):
        ticket.shortcut = partial(_hurry, index, ticket, write, outlet)
    async for item in merged(tickets):
        for event in write(item):
            yield event


def _hurry(index: int, ticket: Ticket, write: Callable[[Merged], list[bytes]], outlet: Outlet) -> bool:
    """`Ticket.shortcut`: what came goes out on the spot, where that is possible."""
    if not outlet.ready:
        return False
    if events := write(Merged(index, ticket, ticket.take())):
        outlet.write(events[0] if len(events) == 1 else b"".join(events))
    return True
