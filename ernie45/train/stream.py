"""Pre-training rows: one global sequence over several corpora, that does not know how many processes read it.

Row i of the sequence is `length` tokens of one source. Which source is decided by the largest deficit against the weights; where in the
source follows from how many of its rows came before. Inside a source, documents stand in an order keyed by (seed, epoch, source) and are
cut where rows end; epochs follow each other without a gap, so no token is lost. The state is one integer, and any row can be asked for.
Letters: T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ernie45.errors import ConfigError, DataError
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import TrainBatch
from ernie45.train.examples import permutation
from ernie45.train.shards import Corpus


@dataclass(frozen=True)
class Source:
    """A corpus and its share of the rows, as a weight among the others."""

    name: str
    corpus: Corpus
    weight: float = 1.0


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
    """One source as an endless line of tokens: its documents in the order of each epoch."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
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


class Stream:
    """Rows of `length` tokens from weighted sources. `batch(i)` is row i of the global sequence, whoever asks."""

    def __init__(self, sources: Sequence[Source], length: int, seed: int) -> None:
        if length < 2:
            raise ConfigError(f"a row must have at least 2 tokens, not {length}")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ConfigError(f"two sources have one name: {', '.join(names)}")
        self.mixture = Mixture([source.weight for source in sources])
        self.lines, self.length = [_Ordered(source, seed) for source in sources], length

    def batch(self, index: int) -> TrainBatch:
        """Row `index`, documents apart; the last token of a cut document learns the token that follows the cut."""
        source, before = self.mixture.row(index)
        pieces = self.lines[source].pieces(before * self.length, self.length)
        labels = [np.append(tokens[1:].astype(np.int64), IGNORED if follows is None else follows) for tokens, follows in pieces]
        return TrainBatch(
            torch.from_numpy(np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)),
            torch.from_numpy(np.concatenate(labels)),
            torch.cat([torch.arange(len(tokens)) for tokens, _ in pieces]),
            tuple(np.cumsum([len(tokens) for tokens, _ in pieces]).tolist()),
        )
