"""Several processes learn what one learns: losses, gradients, biases, averages, and the order of the data."""

import shutil

import pytest
import torch

from ernie45.config import Environment
from ernie45.errors import ConfigError
from ernie45.parallel.ranks import ALONE, open_ranks
from ernie45.train.loop import RunConfig, train
from tests.parallel import facts
from tests.parallel.several import results

# float32 sums in another order; gradients of size 1e-3 to 1
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("two")
    return folder, results(facts.everything, 2, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds."""
    return facts.alone() | {"run": facts.run(ALONE, tmp_path_factory.mktemp("one") / "run", 4)}


def assert_same(a, b, **how):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(how or CLOSE), msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_of_two_ranks_is_the_step_of_one(two, one):
    report, grads, biases = one["language"]
    for rank in two[1]:
        ours, our_grads, our_biases = rank["language"]
        for name in ("loss", "mtp_loss", "balance_loss", "z_loss", "orthogonal_loss"):
            assert getattr(ours, name) == pytest.approx(getattr(report, name), abs=1e-6), name
        assert ours.norm == pytest.approx(report.norm, rel=1e-5)
        assert (ours.tokens, ours.learned, ours.load) == (report.tokens, report.learned, report.load)
        assert_same(our_grads, grads)
        assert_same(our_biases, biases, atol=0, rtol=0)
    assert any(bias.any() for bias in biases.values())


def test_pairs_are_shared_out_likewise(two, one):
    report, grads = one["preference"]
    for rank in two[1]:
        ours, our_grads = rank["preference"]
        assert ours.loss == pytest.approx(report.loss, abs=1e-6)
        assert ours.margin == pytest.approx(report.margin, abs=1e-6)
        assert (ours.accuracy, ours.tokens, ours.learned) == (report.accuracy, report.tokens, report.learned)
        assert_same(our_grads, grads)


def test_all_ranks_refuse_what_one_cannot_learn(two):
    assert [rank["refused"] for rank in two[1]] == [(True, True)] * 2


def test_what_the_first_rank_cannot_do_ends_all(two):
    assert [rank["told"] for rank in two[1]] == ["the disk is full", "rank 0 ended: the disk is full"]


def test_numbers_and_digests_meet(two):
    assert [rank["sums"] for rank in two[1]] == [[2.0, 1.0]] * 2
    assert [rank["order"] for rank in two[1]] == [[bytes([n]) * 32 for n in range(3)]] * 2


def test_a_run_of_two_ranks_is_the_run_of_one(two, one):
    progress, weights, average, losses = one["run"]
    for rank in two[1]:
        ours, our_weights, our_average, _ = rank["run"]
        assert ours == progress  # with the digest of what was read
        assert_same(our_weights, weights, atol=2e-6, rtol=1e-4)
        assert_same(our_average, average, atol=2e-6, rtol=1e-4)
    assert two[1][0]["run"][3] == pytest.approx(losses, abs=1e-6)
    assert two[1][1]["run"][3] == []  # one rank talks
    for name, value in two[1][0]["run"][1].items():
        assert torch.equal(value, two[1][1]["run"][1][name]), name


def test_a_run_goes_on_with_another_number_of_ranks(two, tmp_path):
    """Four steps by two ranks, then two by one or by three: the same data in the same order, the same losses."""
    for place in ("by-one", "by-three"):
        shutil.copytree(two[0] / "run", tmp_path / place / "run")
    whole, _, _, losses = facts.run(ALONE, tmp_path / "whole", 6)
    by_one, _, _, seen_by_one = facts.go_on(ALONE, tmp_path / "by-one")
    three = results(facts.go_on, 3, tmp_path / "by-three")
    for progress, seen in ((by_one, seen_by_one), (three[0][0], three[0][3])):
        assert progress == whole
        assert seen == pytest.approx(losses[4:], abs=1e-6)
    assert [progress.digest for progress, *_ in three] == [whole.digest] * 3


def test_a_rank_without_a_batch_is_refused(tmp_path):
    from ernie45.parallel.ranks import Ranks

    decoder = facts.moe()
    with pytest.raises(ConfigError, match="set accumulate to 4"):
        train(None, decoder, facts.DATA, None, RunConfig(steps=1, accumulate=3), tmp_path, "f", ranks=Ranks(0, 4))


def test_a_launcher_that_miscounts_is_named(tmp_path):
    with pytest.raises(ConfigError, match="rank 2 of 2"), open_ranks(Environment(cache_dir=tmp_path, rank=2, world=2), 5.0):
        pass
    with pytest.raises(ConfigError, match="RANK is 'x'"):
        Environment.read({"RANK": "x", "WORLD_SIZE": "2"})
    assert Environment.read({"WORLD_SIZE": "2"}).world == 1
    with open_ranks(Environment(cache_dir=tmp_path), 5.0) as ranks:
        assert ranks is ALONE
