"""Drafts from the text itself: what followed the last time the newest tokens stood there. No tensors here.

Summaries, edits, code and quotations repeat long stretches of their prompt word for word. The index knows for each pair of tokens the
place where it ended last, and for each place the place before it (a chain, as packers of the LZ77 family keep them); of the places that a
chain leads to, the one whose past agrees longest with the text's end is copied from. One pair per token: a dictionary entry and two
numbers, about 120 bytes a token at worst, as long as the request lives.
"""

from array import array
from collections.abc import Sequence

_PLACES = 24  # of a chain that are looked at: the newest ones
_LONGEST = 32  # tokens of agreement beyond which a place is good enough


class SuffixIndex:
    """One request's text, growing at its end."""

    def __init__(self, hint: Sequence[int], text: Sequence[int]) -> None:
        """hint: text that the answer is likely to repeat, such as a file to be edited; `text`: the prompt."""
        self._tokens = array("q", (*hint, *text))
        self._before = array("q")  # per place: where the pair that ends there ended the time before, or -1
        self._last: dict[tuple[int, int], int] = {}
        self._seam = len(hint)  # no pair is made of a hint's end and the text's beginning
        self._read()

    def __len__(self) -> int:
        """Tokens of the text, without the hint."""
        return len(self._tokens) - self._seam

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        self._tokens.extend(tokens)
        self._read()

    def draft(self, count: int) -> tuple[int, ...]:
        """At most `count` tokens that may come next; none where the newest two tokens never stood together before."""
        tokens = self._tokens
        end = len(tokens) - 1
        place = self._before[end] if end > 0 else -1
        best, best_agreement = -1, 1
        for _ in range(_PLACES):
            if place < 0:
                break
            agreement = self._agreement(place, end)
            if agreement > best_agreement:
                best, best_agreement = place, agreement
                if agreement == _LONGEST:
                    break
            place = self._before[place]
        if best < 0:
            return ()
        count = min(count, 2 * (best_agreement - 1))  # a short agreement is often chance
        period = end - best  # a copy that reaches the end of the text goes on with itself
        return tuple(tokens[best + 1 + i % period] for i in range(count))

    def _agreement(self, place: int, end: int) -> int:
        """How many tokens up to `place` and up to `end` are equal."""
        tokens = self._tokens
        most = min(_LONGEST, place + 1)
        return next((n for n in range(most) if tokens[place - n] != tokens[end - n]), most)

    def _read(self) -> None:
        """Enters the places that are new."""
        tokens, before, last = self._tokens, self._before, self._last
        for place in range(len(before), len(tokens)):
            if place == 0 or place == self._seam:
                before.append(-1)
                continue
            pair = tokens[place - 1], tokens[place]
            before.append(last.get(pair, -1))
            last[pair] = place
