"""The global sequence of rows: every token once an epoch, shares kept, the same rows however many ranks read."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError, DataError
from ernie45.tokens.template import IGNORED
from ernie45.train.shards import open_corpus, write_corpus
from ernie45.train.stream import Mixture, Source, Stream


def corpus(folder, name, lengths, first=0):
    """Documents whose tokens are all different, so that every one can be told."""
    starts = np.cumsum([first, *lengths])
    documents = [range(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    write_corpus(folder / name, documents, 10_000)
    return Source(name, open_corpus(folder / name))


def test_a_corpus_comes_back(tmp_path):
    seen = []
    write_corpus(tmp_path / "a", [[5, 6], [7], [8, 9, 1]], 10, lambda *counts: seen.append(counts))
    held = open_corpus(tmp_path / "a.json")
    assert held.tokens.tolist() == [5, 6, 7, 8, 9, 1]
    assert held.ends.tolist() == [2, 3, 6]
    assert held.document_length().tolist() == [2, 1, 3]
    assert seen[-1] == (3, 6)


@pytest.mark.parametrize(
    ("documents", "says"), [([[1], []], "document 1 is empty"), ([[1, 10]], "outside the vocabulary"), ([[-1]], "outside"), ([], "not one")]
)
def test_what_is_no_document_is_refused_and_leaves_no_corpus(tmp_path, documents, says):
    with pytest.raises(DataError, match=says):
        write_corpus(tmp_path / "a", documents, 10)
    with pytest.raises(DataError, match="cannot be read"):
        open_corpus(tmp_path / "a")


def test_a_corpus_is_not_overwritten(tmp_path):
    write_corpus(tmp_path / "a", [[1]], 10)
    with pytest.raises(DataError, match="exists"):
        write_corpus(tmp_path / "a", [[2]], 10)


@pytest.mark.parametrize("damage", ["short", "ends", "json"])
def test_a_damaged_corpus_is_told(tmp_path, damage):
    write_corpus(tmp_path / "a", [[1, 2], [3, 4]], 10)
    if damage == "short":
        (tmp_path / "a.tokens").write_bytes(b"1234")
    elif damage == "ends":
        (tmp_path / "a.ends").write_bytes(np.array([3, 4], "<i8").tobytes())
    else:
        (tmp_path / "a.json").write_text(json.dumps({"documents": 2}))
    with pytest.raises(DataError, match=r"a(\.ends|\.json)?:"):
        open_corpus(tmp_path / "a")


@pytest.mark.parametrize("length", [2, 5, 7, 64])
def test_each_epoch_has_every_token_once(tmp_path, length):
    lengths = [1, 4, 9, 2, 17, 3, 6]
    stream = Stream([corpus(tmp_path, "a", lengths)], length, seed=3)
    total = sum(lengths)
    rows = torch.cat([stream.batch(n).tokens_T for n in range(-(-3 * total // length))])
    epochs = [rows[n * total : (n + 1) * total].tolist() for n in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_labels_are_the_next_token_of_the_same_document_even_over_a_cut(tmp_path):
    lengths = [1, 4, 9, 2, 17]
    last = set((np.cumsum(lengths) - 1).tolist())
    stream = Stream([corpus(tmp_path, "a", lengths)], 5, seed=0)
    for n in range(12):
        batch = stream.batch(n)
        assert batch.num_tokens == 5 == batch.doc_ends[-1]
        for token, label in zip(batch.tokens_T.tolist(), batch.labels_T.tolist(), strict=True):
            assert label == (IGNORED if token in last else token + 1)
        starts = [0, *batch.doc_ends[:-1]]
        assert batch.positions_T[starts].tolist() == [0] * len(starts)


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), rows=st.integers(1, 200))
def test_no_source_is_ever_a_whole_row_or_more_from_its_share(weights, rows):
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for n in range(rows):
        source, before = mixture.row(n)
        assert before == counts[source]
        counts[source] += 1
    for weight, count in zip(weights, counts, strict=True):
        # largest deficit first keeps each source within one row for two sources, and within the number of sources for more
        assert abs(count - rows * weight / sum(weights)) < max(1.0001, len(weights) - 1)


def test_rows_can_be_asked_for_in_any_order(tmp_path):
    sources = [corpus(tmp_path, "a", [5, 6, 7]), corpus(tmp_path, "b", [9, 3], first=500)]
    one, other = (Stream(sources, 4, seed=1) for _ in range(2))
    forward = [one.batch(n).tokens_T for n in range(20)]
    backward = [other.batch(n).tokens_T for n in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, float("nan")], [-1.0]])
def test_weights_make_sense(weights):
    with pytest.raises(ConfigError, match="weights"):
        Mixture(weights)


def test_sources_have_names_of_their_own(tmp_path):
    source = corpus(tmp_path, "a", [5])
    with pytest.raises(ConfigError, match="one name"):
        Stream([source, source], 4, 0)
    with pytest.raises(ConfigError, match="at least 2"):
        Stream([source], 1, 0)
