"""The line before the model: bounded, by priority, and fair between callers.

Of equal priority, the caller who has been given least goes first: each caller has a clock that its requests move on by their size, and a
caller who comes back after a pause starts at the others' clock, so that nobody saves up a right to be served alone.
"""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Line(Generic[T]):
    """add, take the next, remove who gives up."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._levels: dict[int, dict[str, deque[tuple[T, float]]]] = {}  # by priority, then caller; each in order of arrival
        self._clocks: dict[str, float] = {}
        self._now = 0.0  # the clock of who was taken last
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def room(self, count: int) -> bool:
        """Whether so many more may wait."""
        return self._count + count <= self.most

    def add(self, item: T, caller: str, priority: int, size: float) -> None:
        """Puts an item in line. size: what it will cost, in any unit, the same for all."""
        self._levels.setdefault(priority, {}).setdefault(caller, deque()).append((item, size))
        self._clocks[caller] = max(self._clocks.get(caller, 0.0), self._now)
        self._count += 1

    def peek(self) -> T | None:
        """What `take` would give, left in its place."""
        if not self._count:
            return None
        priority, caller = self._first()
        return self._levels[priority][caller][0][0]

    def _first(self) -> tuple[int, str]:
        """Priority and caller of the next."""
        priority = min(self._levels)
        return priority, min(self._levels[priority], key=lambda name: self._clocks[name])

    def take(self) -> T | None:
        """The next; None when nobody waits."""
        if not self._count:
            return None
        priority, caller = self._first()
        item, size = self._levels[priority][caller].popleft()
        self._now = self._clocks[caller]
        self._clocks[caller] += size
        self._count -= 1
        self._tidy(priority, caller)
        return item

    def holds(self, item: T) -> bool:
        """Whether an item is in line."""
        return any(entry[0] is item for level in self._levels.values() for items in level.values() for entry in items)

    def remove(self, item: T) -> bool:
        """Takes an item out wherever it stands. False when it is not in line."""
        for priority, level in self._levels.items():
            for caller, items in level.items():
                for entry in items:
                    if entry[0] is item:
                        items.remove(entry)
                        self._count -= 1
                        self._tidy(priority, caller)
                        return True
        return False

    def _tidy(self, priority: int, caller: str) -> None:
        """Forgets empty places, and clocks that nobody waits by and that lie behind: they would start at the others' anyway."""
        level = self._levels[priority]
        if not level[caller]:
            del level[caller]
        if not level:
            del self._levels[priority]
        if len(self._clocks) > 1024:
            waiting = {name for level in self._levels.values() for name in level}
            self._clocks = {name: clock for name, clock in self._clocks.items() if name in waiting or clock > self._now}
