"""Responses that are kept, so that they can be fetched and gone on with: in memory, bounded, each seen by its owner only."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ernie45.server.access import Caller
from ernie45.server.failures import Failure


@dataclass(frozen=True)
class Kept:
    """A response, and the conversation up to and with it (without instructions), as chat messages."""

    owner: str
    body: dict[str, Any]
    messages: tuple[dict[str, Any], ...]
    size: int


class ResponseStore:
    """The newest go out last. most: how many;  characters: of all conversations together."""

    def __init__(self, most: int = 1000, characters: int = 64 << 20) -> None:
        self._most = most
        self._characters = characters
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._size = 0

    def keep(self, kept: Kept) -> None:
        """Keeps a response, and forgets the oldest when there is no room."""
        self._kept[kept.body["id"]] = kept
        self._size += kept.size
        while len(self._kept) > self._most or self._size > self._characters:
            _, old = self._kept.popitem(last=False)
            self._size -= old.size

    def find(self, id: str, caller: Caller) -> Kept:
        """A response of this caller. Raises `Failure` 404, for those of others too."""
        kept = self._kept.get(id)
        if kept is None or kept.owner != caller.owner:
            raise Failure(404, f"there is no response '{id[:80]}' (the newest {self._most:,} are kept)", code="not_found")
        return kept

    def drop(self, id: str, caller: Caller) -> None:
        """Forgets a response. Raises `Failure` 404."""
        self._size -= self.find(id, caller).size
        del self._kept[id]
