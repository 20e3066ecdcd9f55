"""Pictures of the requests that are alive: encoded piece by piece, kept by content, put where their tokens stand.

A request with pictures waits here until all of them are encoded; then it is scheduled as any other. What was encoded is known by the digest
of its picture. It stays as long as a request needs it, and then until its place is needed.
Letters: T tokens of a step or of a prompt, F tokens of pictures, D width.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.engine.batch import Batch
from ernie45.engine.request import PlacedPicture, Request
from ernie45.engine.scheduler import Plan
from ernie45.errors import RequestError
from ernie45.models.vision import Sight
from ernie45.models.vision_pieces import Pieces, encode_in_pieces
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import Picture, PixelRules


class Look(NamedTuple):
    """A step with pictures: positions int64 [T, 3], or [T] where all is text; which tokens were seen, bool [T], or None; rows to replace.

    `features_FD` stand at the rows `places_F` of the embedding.
    """

    positions: Tensor
    vision_T: Tensor | None = None
    places_F: Tensor | None = None
    features_FD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """How a request's tokens stand: positions and modality of its prompt, and how far behind its place in text each later token stands."""

    positions_T3: Tensor
    vision_T: Tensor
    shift: int
    pictures: tuple[PlacedPicture, ...]


class Eyes:
    """check / begin / look / forget around a request's life; `compose` for each step.

    capacity: bytes of encoded pictures in memory. A single request may need more and has it; others wait meanwhile.
    """

    def __init__(self, sight: Sight, rules: PixelRules, width: int, capacity: int) -> None:
        self.rules, self.capacity = rules, capacity
        self._sight = sight
        self._token_bytes = width * sight.resampler.norm.weight.dtype.itemsize
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()  # used last stands last
        self._holders: dict[bytes, int] = {}  # of pictures that are encoded or are to be, and their tokens
        self._promised: dict[bytes, int] = {}
        self._work: OrderedDict[bytes, Pieces] = OrderedDict()
        self._line: deque[Request] = deque()  # without room so far
        self._waiting: dict[str, Request] = {}  # for work to be done
        self._seen: dict[str, _Seen] = {}

    @property
    def waiting(self) -> int:
        """Requests that are not ready for the scheduler yet."""
        return len(self._line) + len(self._waiting)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id waits here."""
        return request_id in self._waiting or any(request.id == request_id for request in self._line)

    def check(self, request: Request) -> None:
        """Raises `RequestError` when pictures and placeholders of a prompt do not meet, or were cut for another model."""
        for placed in request.pictures:
            picture = placed.picture
            if (picture.patch, picture.merge, picture.pair) != (self.rules.patch, self.rules.merge, self.rules.pair):
                raise RequestError("the pictures were made by the rules of another model", "pictures")
        starts = self.starts(request.prompt, [placed.picture for placed in request.pictures])
        for placed, start in zip(request.pictures, starts, strict=True):
            if placed.start != start:
                raise RequestError(f"a picture is said to stand at {placed.start}; its placeholders begin at {start}", "pictures")

    def starts(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
        """Where each picture's placeholders begin. Raises `RequestError` when placeholders and pictures do not meet."""
        self._sight.positions(prompt, [picture.grid for picture in pictures])  # from here on numbers and sizes are right
        starts, at = [], 0
        for picture in pictures:
            at = next(i for i in range(at, len(prompt)) if prompt[i] in self._sight.config.placeholder_ids)
            starts.append(at)
            at += picture.tokens
        return tuple(starts)

    def begin(self, request: Request) -> bool:
        """Takes in a checked request; True when it can be scheduled at once, having nothing to wait for."""
        vision_T = self._sight.is_vision(torch.tensor(request.prompt))
        if not request.pictures and not bool(vision_T.any()):
            return True
        places = self._sight.positions(request.prompt, [placed.picture.grid for placed in request.pictures])
        shift = places.following - len(request.prompt)
        self._seen[request.id] = _Seen(places.positions_T3, vision_T, shift, request.pictures)
        if not request.pictures:
            return True
        self._line.append(request)
        return False

    @torch.inference_mode()
    def look(self, budget: int) -> list[Request]:
        """Encodes for about `budget` multiplications, and returns the requests that are ready now."""
        self._start()
        spent = 0
        while self._work and spent < budget:
            digest, pieces = next(iter(self._work.items()))
            try:
                spent += next(pieces)
            except StopIteration as done:
                del self._work[digest]
                self._features[digest] = done.value
                self._evict()
        ready = [request for request in self._waiting.values() if all(p.picture.digest in self._features for p in request.pictures)]
        for request in ready:
            del self._waiting[request.id]
        return ready

    def forget(self, request_id: str) -> bool:
        """A request is over. True when it still waited here."""
        seen = self._seen.pop(request_id, None)
        waits = self.has(request_id)
        in_line = waits and request_id not in self._waiting
        self._waiting.pop(request_id, None)
        if in_line:
            self._line = deque(request for request in self._line if request.id != request_id)
        elif seen is not None:
            for digest in _digests(seen.pictures):
                self._holders[digest] -= 1
                if not self._holders[digest]:
                    del self._holders[digest], self._promised[digest]
                    if (pieces := self._work.pop(digest, None)) is not None:
                        pieces.close()
            self._evict()
        return waits

    def lost(self) -> list[str]:
        """The requests that wait for the picture whose encoding has just broken; it is given up."""
        if not self._work:
            return []
        digest, _ = self._work.popitem(last=False)
        return [request.id for request in self._waiting.values() if digest in _digests(request.pictures)]

    def compose(self, plan: Plan, batch: Batch) -> Look | None:
        """What a step computes where a request of it has pictures; None where none has."""
        both = zip(plan.rows, batch.spans, strict=True)
        rows = [(row, span, self._seen[row.request_id]) for row, span in both if row.request_id in self._seen]
        if not rows:
            return None
        positions_T3 = batch.positions_T[:, None].repeat(1, 3)
        vision_T = torch.zeros(len(batch.tokens_T), dtype=torch.bool)
        places: list[Tensor] = []
        features: list[Tensor] = []
        for row, span, seen in rows:
            prompt = range(row.start, max(row.start, min(span.length, len(seen.vision_T))))
            behind = span.first + len(prompt)
            positions_T3[span.first : behind] = seen.positions_T3[prompt.start : prompt.stop]
            positions_T3[behind : span.end] += seen.shift
            vision_T[span.first : behind] = seen.vision_T[prompt.start : prompt.stop]
            for placed in seen.pictures:
                start, end = max(placed.start, prompt.start), min(placed.start + placed.picture.tokens, prompt.stop)
                if start < end:
                    places.append(torch.arange(start, end) - row.start + span.first)
                    features.append(self._features[placed.picture.digest][start - placed.start : end - placed.start])
        if not bool(vision_T.any()):
            return Look(positions_T3[:, 0])
        return Look(positions_T3, vision_T, torch.cat(places) if places else None, torch.cat(features) if features else None)

    def verify(self) -> None:
        """Proves that holders and requests agree; when nothing waits and nothing runs, that nothing is held. For tests and idle moments."""
        held: dict[bytes, int] = {}
        in_line = {request.id for request in self._line}
        for request_id, seen in self._seen.items():
            for digest in _digests(seen.pictures) if request_id not in in_line else ():
                held[digest] = held.get(digest, 0) + 1
        assert held == self._holders
        assert all(digest in self._features or digest in self._work for digest in held)
        assert all(digest in held for digest in self._work)
        assert held or self._size() <= self.capacity

    # ---- parts

    def _start(self) -> None:
        """Begins the work for requests in line, in order, as far as their pictures have room beside those in use."""
        while self._line:
            request = self._line[0]
            pictures = {placed.picture.digest: placed.picture for placed in request.pictures}
            new = sum(picture.tokens for digest, picture in pictures.items() if digest not in self._holders)
            if self._holders and (sum(self._promised.values()) + new) * self._token_bytes > self.capacity:
                return
            self._line.popleft()
            self._waiting[request.id] = request
            for digest, picture in pictures.items():
                self._holders[digest] = self._holders.get(digest, 0) + 1
                self._promised[digest] = picture.tokens
                if digest in self._features:
                    self._features.move_to_end(digest)
                elif digest not in self._work:
                    self._work[digest] = self._encoding(picture)

    def _encoding(self, picture: Picture) -> Pieces:
        patches_SC = torch.from_numpy(patches(picture, self.rules))
        return (yield from encode_in_pieces(self._sight, patches_SC, picture.grid))

    def _evict(self) -> None:
        """Lets encoded pictures go that no request holds, the one unused for longest first, until the rest fits."""
        for digest in [digest for digest in self._features if digest not in self._holders]:
            if self._size() <= self.capacity:
                return
            del self._features[digest]

    def _size(self) -> int:
        return sum(features_FD.nbytes for features_FD in self._features.values())


def _digests(pictures: tuple[PlacedPicture, ...]) -> set[bytes]:
    return {placed.picture.digest for placed in pictures}
