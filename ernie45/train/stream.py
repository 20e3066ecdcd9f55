"""Pre-training rows: one global sequence over several corpora, that does not know how many processes read it.

Row i of the sequence is `length` tokens of one source. Which source is decided by the largest deficit against the weights; where in the
source follows from how many of its rows came before. Inside a source, documents stand in an order keyed by (seed, epoch, source) and are
cut where rows end; epochs follow each other without a gap, so no token is lost. A source of rows with pictures is not cut: its examples are
packed whole, and a batch of them stands for a row. The state is one integer, and any row can be asked for.
Letters: T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ernie45.errors import ConfigError, DataError
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import TrainBatch
from ernie45.train.examples import PackedExamples, permutation
from ernie45.train.shards import Corpus


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the rows, as a weight among the others."""

    name: str
    corpus: Corpus
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return self.corpus.facts.tokens

    def room(self, length: int) -> int:
        """Tokens that an epoch takes in rows of `length`."""
        return self.tokens

    def line(self, length: int, seed: int) -> "Line":
        """Its rows."""
        return _Ordered(self, length, seed)


@dataclass(frozen=True)
class RowSource:
    """Examples that are packed whole, and their share of the rows, as a weight among the others."""

    name: str
    rows: PackedExamples
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(len(example.ids) for example in self.rows.examples)

    def room(self, length: int) -> int:
        """Tokens that an epoch takes in rows of `length`: what a batch leaves empty counts."""
        return self.rows.count(1) * length

    def line(self, length: int, seed: int) -> "Line":
        """Its rows, which are batches already."""
        assert self.rows.limit == length, "the batches of a source are as long as rows"
        return self.rows


class Line(Protocol):
    """One source as an endless sequence of rows."""

    def batch(self, index: int) -> TrainBatch:
        """Row `index` of this source."""
        ...


class Mixture:
    """Which source each row comes from: always the one that is furthest behind its share; the first of equals."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not (math.isfinite(weight) and weight > 0) for weight in weights):
            raise ConfigError(f"the weights of the sources must be numbers above 0, not {list(weights)}")
        self.shares = [weight / sum(weights) for weight in weights]
        self._chosen: list[int] = []
        self._before: list[int] = []
        self._counts = [0] * len(weights)

    def row(self, index: int) -> tuple[int, int]:
        """The source of row `index`, and how many of its rows came before."""
        while len(self._chosen) <= index:
            done = len(self._chosen) + 1
            deficits = [share * done - count for share, count in zip(self.shares, self._counts, strict=True)]
            source = max(range(len(deficits)), key=deficits.__getitem__)
            self._chosen.append(source)
            self._before.append(self._counts[source])
            self._counts[source] += 1
        return self._chosen[index], self._before[index]


class _Ordered:
    """One corpus as an endless line of tokens: its documents in the order of each epoch."""

    def __init__(self, source: Source, length: int, seed: int) -> None:
        self.source, self.length, self.seed = source, length, seed
        self.lengths = source.corpus.document_length()
        if int(self.lengths.min()) < 1:
            raise DataError(f"{source.corpus.path}: document {int(self.lengths.argmin())} is empty; write the corpus again")
        self._epoch = -1

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = permutation(len(self.lengths), self.seed, epoch, self.source.name)
            self._ends = self.lengths[self._order].cumsum()
            self._epoch = epoch

    def pieces(self, start: int, length: int) -> list[tuple[np.ndarray, int | None]]:
        """Tokens `start` .. `start + length` of the line: each piece with the token that follows it in its document, if one does."""
        total = self.source.corpus.facts.tokens
        pieces: list[tuple[np.ndarray, int | None]] = []
        while length:
            epoch, place = divmod(start, total)
            self._enter(epoch)
            slot = int(np.searchsorted(self._ends, place, side="right"))
            document = int(self._order[slot])
            left = int(self._ends[slot]) - place
            end = int(self.source.corpus.ends[document])
            first, taken = end - left, min(left, length)
            follows = int(self.source.corpus.tokens[first + taken]) if taken < left else None
            pieces.append((self.source.corpus.tokens[first : first + taken], follows))
            start, length = start + taken, length - taken
        return pieces

    def batch(self, index: int) -> TrainBatch:
        """Row `index`, documents apart; the last token of a cut document learns the token that follows the cut."""
        pieces = self.pieces(index * self.length, self.length)
        labels = [np.append(tokens[1:].astype(np.int64), IGNORED if follows is None else follows) for tokens, follows in pieces]
        return TrainBatch(
            torch.from_numpy(np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)),
            torch.from_numpy(np.concatenate(labels)),
            torch.cat([torch.arange(len(tokens)) for tokens, _ in pieces]),
            tuple(np.cumsum([len(tokens) for tokens, _ in pieces]).tolist()),
        )


class Stream:
    """Rows of `length` tokens from weighted sources. `batch(i)` is row i of the global sequence, whoever asks."""

    def __init__(self, sources: Sequence[Source | RowSource], length: int, seed: int) -> None:
        if length < 2:
            raise ConfigError(f"a row must have at least 2 tokens, not {length}")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ConfigError(f"two sources have one name: {', '.join(names)}")
        self.mixture = Mixture([source.weight for source in sources])
        self.lines = [source.line(length, seed) for source in sources]

    def batch(self, index: int) -> TrainBatch:
        """Row `index`."""
        source, before = self.mixture.row(index)
        return self.lines[source].batch(before)
