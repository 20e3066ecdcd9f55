"""The last minutes of a server in numbers: how long things took, and how many tokens came when. Bounded however much is asked."""

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

WINDOW = 300.0
"""Seconds that percentiles look back, to within a slice."""

_SLICE = 10.0
_RATIO = 1.04  # between neighbouring classes of times: a percentile is right to 2 %
_SHORTEST = 1e-6  # seconds; what is shorter counts as this
_PERCENTILES = (50, 90, 95, 99)

EVERY = 2.0
"""Seconds of one point of the throughput's history."""

_POINTS = 90


class Times:
    """Percentiles of times over the last minutes: counts by class of length, in slices that are forgotten one after another."""

    def __init__(self) -> None:
        self._slices: deque[tuple[int, Counter[int]]] = deque(maxlen=round(WINDOW / _SLICE))

    def add(self, seconds: float, now: float, count: int = 1) -> None:
        """One more of them, or several that were equally long."""
        number = int(now // _SLICE)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, Counter()))
        self._slices[-1][1][round(math.log(max(seconds, _SHORTEST) / _SHORTEST) / math.log(_RATIO))] += count

    def percentiles(self, now: float) -> dict[str, float | int]:
        """`p50`, `p90`, `p95`, `p99` in seconds by the nearest rank, and their `count`; empty when nothing happened."""
        whole: Counter[int] = Counter()
        for number, counts in self._slices:
            if now // _SLICE - number < WINDOW / _SLICE:
                whole += counts
        count = whole.total()
        found: dict[str, float | int] = {}
        seen, wanted = 0, list(_PERCENTILES)
        for kind in sorted(whole):
            seen += whole[kind]
            while wanted and seen * 100 >= wanted[0] * count:
                found[f"p{wanted.pop(0)}"] = _SHORTEST * _RATIO**kind
        return found | ({"count": count} if count else {})


class Pace:
    """Tokens by the time they came, in points of `EVERY` seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, int]] = deque(maxlen=_POINTS + 1)  # the number of the point, tokens

    def add(self, tokens: int, now: float) -> None:
        """So many came now."""
        number = int(now // EVERY)
        if self._points and self._points[-1][0] == number:
            tokens += self._points.pop()[1]
        self._points.append((number, tokens))

    def history(self, now: float) -> list[float]:
        """Tokens a second of the last points that are over, oldest first."""
        known, last = dict(self._points), int(now // EVERY) - 1
        return [known.get(number, 0) / EVERY for number in range(last - _POINTS + 1, last + 1)]

    def per_second(self, now: float) -> float:
        """Tokens a second of late: over the point that is under way and four before it."""
        first = int(now // EVERY) - 4
        return sum(tokens for number, tokens in self._points if number >= first) / (now - first * EVERY)


class Recent:
    """What the page of the server's state shows of the last minutes, and counts since the start.

    Times, in seconds: ttft from asking to the first token; tpot per further token, by answer; itl between a token, or the tokens of one
    step, and the one before; e2e from asking to the end; queue in line.
    """

    def __init__(self) -> None:
        self._times = {name: Times() for name in ("ttft", "tpot", "itl", "e2e", "queue")}
        self._written, self._read = Pace(), Pace()
        self.totals = {"requests": 0, "errors": 0, "cancelled": 0}

    def stepped(self, written: int, read: int, gaps: Mapping[float, int], now: float) -> None:
        """A step brought so many tokens of answers and read so many of prompts; gaps: since so many answers' last tokens."""
        self._written.add(written, now)
        self._read.add(read, now)
        for gap, count in gaps.items():
            self._times["itl"].add(gap, now, count)

    def finished(self, end: str, times: Mapping[str, float], now: float) -> None:
        """An answer is over. end: "" or the kind of total it belongs to beside requests."""
        self.totals["requests"] += 1
        if end:
            self.totals[end] += 1
        for name, seconds in times.items():
            self._times[name].add(seconds, now)

    def rates(self, now: float) -> dict[str, float]:
        """Tokens a second over the last eight to ten seconds."""
        return {"prompt_tokens_per_second": self._read.per_second(now), "generated_tokens_per_second": self._written.per_second(now)}

    def history(self, now: float) -> dict[str, Any]:
        """Tokens a second over the last minutes, a point for each `seconds`."""
        read, written = self._read.history(now), self._written.history(now)
        return {"seconds": EVERY, "prompt_tokens_per_second": read, "generated_tokens_per_second": written}

    def latency(self, now: float) -> dict[str, Any]:
        """Percentiles of each kind of time that happened."""
        found = {name: times.percentiles(now) for name, times in self._times.items()}
        return {"window_seconds": WINDOW} | {name: values for name, values in found.items() if values}
