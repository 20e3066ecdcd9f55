"""Stop strings in text that arrives in pieces: what could be the beginning of one is held back until it is clear.

Of several stop strings the one that is complete first counts, the longer one when two are complete at the same character; how the text
was cut into pieces makes no difference. No tensors here.
"""

from collections.abc import Sequence


class StopFinder:
    """push pieces, take what is safe to show; `found` is the stop string once it is there, and nothing more comes out after it."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """include: the stop string itself is shown too."""
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is settled with this piece."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, start, self.found = min(ends)
            shown, self._held = self._held[: end if self._include else start], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
