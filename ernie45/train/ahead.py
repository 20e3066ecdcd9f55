"""Batches made ahead: while a step learns, a thread reads, decodes and packs what the next one needs.

Making a batch of texts costs little; one with pictures reads files, decodes and resizes them and cuts them into patches, and the step would
wait for that. Which batches a step has does not change, and only one thread makes them, in their order.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from ernie45.train.examples import Batch, Batches

B = TypeVar("B", bound=Batch)


class Ahead(Generic[B]):
    """The batches of steps that follow one another, each step's made while the one before is at work. Holds two steps' batches at most.

    A batch that cannot be made raises when its step asks for it, and not earlier.
    """

    def __init__(self, data: Batches[B], share: range, count: int, last: int) -> None:
        """share: which of a step's `count` batches are this rank's; last: the number of the batch behind the run's last one."""
        self._data, self._share, self._count, self._last = data, share, count, last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[B]]] | None = None

    def take(self, start: int) -> list[B]:
        """This rank's batches of the step that begins with batch `start`. Raises what making them raised."""
        begun, self._next = self._next, None
        made = begun[1] if begun is not None and begun[0] == start else self._begin(start)
        batches = made.result()
        following = start + self._count
        if following < self._last:
            self._next = following, self._begin(following)
        return batches

    def close(self) -> None:
        """Wait for what is being made, whatever becomes of it."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, start: int) -> "Future[list[B]]":
        return self._thread.submit(lambda: [self._data.batch(start + number) for number in self._share])
