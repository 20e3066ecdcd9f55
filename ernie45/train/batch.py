"""What a training step eats: documents packed end to end, without a batch axis and without cross-talk.

Row t of a batch predicts `labels[t]`, so labels are already shifted here, document by document: the last row of a document has none unless
the source knows what followed. Attention is `PackedCausal(doc_ends)`, positions restart in every document.
Letters: T tokens, S patches of all pictures, C numbers of one patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.models.places import Grid
from ernie45.plan.flops import causal_pairs
from ernie45.tokens.messages import Image, Video
from ernie45.tokens.template import IGNORED


@dataclass(frozen=True)
class KnownPicture:
    """A picture of an example, as it was found when the data was read: its part, with the address, its grid, and a digest of its pixels."""

    part: Image | Video
    grid: Grid
    digest: bytes
    where: str
    """The row it belongs to, for messages."""


@dataclass(frozen=True)
class Example:
    """One document: the ids a model sees and, per id, what to learn *in its place* (or `IGNORED`), as `Prompt.labels` has it.

    `pictures` are what the placeholders among the ids stand for, in order.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    pictures: tuple[KnownPicture, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.labels) > 0, "ids and labels of an example differ in length, or it is empty"

    @property
    def learned(self) -> int:
        """Rows that are learned; the first id is nobody's prediction."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Seen:
    """The pictures of a batch, one behind the other, in the order of their placeholders.

    `patches` are normalised, float32 [S, C]; `vision` says which rows go to the vision experts, bool [T]; `digest` is of all pixels.
    """

    patches_SC: Tensor
    grids: tuple[Grid, ...]
    vision_T: Tensor
    digest: bytes

    @property
    def num_vision(self) -> int:
        """Rows that go to the vision experts."""
        return int(self.vision_T.sum())

    @property
    def pairs(self) -> int:
        """Pairs of patches that see each other: those of one frame."""
        return sum(t * (h * w) ** 2 for t, h, w in self.grids)


@dataclass(frozen=True)
class TrainBatch:
    """Packed documents: int64 [T] three times, and the ascending ends of the documents, the last of which is T.

    With pictures among them (`seen`) positions are [T, 3]: time, row, column.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    doc_ends: tuple[int, ...]
    seen: Seen | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.tokens_T.shape[0]

    @property
    def learned(self) -> int:
        """Rows with a label."""
        return int((self.labels_T != IGNORED).sum())

    @property
    def beside_pictures_T(self) -> Tensor:  # noqa: N802
        """Rows of the documents that have pictures, bool [T]."""
        if self.seen is None:
            return torch.zeros_like(self.tokens_T, dtype=torch.bool)
        lengths = torch.tensor(self.doc_ends).diff(prepend=torch.tensor([0])).tolist()
        return torch.cat([part.any().expand(len(part)) for part in self.seen.vision_T.split(lengths)])

    @property
    def beside_pictures(self) -> int:
        """Rows with a label in the documents that have pictures."""
        return int((self.labels_T[self.beside_pictures_T] != IGNORED).sum())

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see each other."""
        return causal_pairs([end - start for start, end in zip((0, *self.doc_ends), self.doc_ends, strict=False)])

    def after_next(self) -> "AfterNext":
        """The same rows as a multi-token predictor sees them: row i is given token i + 1 and learns what row i + 1 learns."""
        last_T = torch.zeros_like(self.tokens_T, dtype=torch.bool)
        last_T[torch.tensor(self.doc_ends) - 1] = True
        # a document's last row sees an arbitrary next token; nothing looks at it and nothing is learned from it
        next_T = self.tokens_T.roll(-1).masked_fill(last_T, 0)
        return AfterNext(next_T, self.labels_T.roll(-1).masked_fill(last_T, IGNORED), self.positions_T + 1)


@dataclass(frozen=True)
class AfterNext:
    """Inputs and labels of the multi-token predictor, int64 [T] each."""

    next_tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor

    @property
    def learned(self) -> int:
        """Rows with a label."""
        return int((self.labels_T != IGNORED).sum())


def pack(examples: Sequence[Example]) -> TrainBatch:
    """Examples end to end, in order."""
    assert examples, "a batch holds at least one example"
    ends, total = [], 0
    for example in examples:
        total += len(example.ids)
        ends.append(total)
    return TrainBatch(
        torch.tensor([id for example in examples for id in example.ids]),
        torch.tensor([label for example in examples for label in (*example.labels[1:], IGNORED)]),
        torch.cat([torch.arange(len(example.ids)) for example in examples]),
        tuple(ends),
    )


def plan_packs(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of documents for each batch of at most `limit` tokens, by best fit in order of arrival; order inside a batch is kept.

    Best fit: each document goes where the least room would be left. Every length must be within the limit.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index, length in enumerate(lengths):
        assert 0 < length <= limit, "documents are cut or refused before they are packed"
        fitting = [(room, n) for n, room in enumerate(rooms) if room >= length]
        if fitting:
            _, n = min(fitting)
            packs[n].append(index)
            rooms[n] -= length
        else:
            packs.append([index])
            rooms.append(limit - length)
    return packs
