"""Several processes learn what one learns: losses, gradients, biases, averages, and the order of the data."""

import shutil
import signal
import time

import pytest
import torch

from ernie45.config import Environment
from ernie45.errors import ConfigError
from ernie45.parallel.ranks import ALONE, Ranks, open_ranks
from ernie45.train.loop import RunConfig, train
from tests.parallel import facts
from tests.parallel.several import results, start, wait

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


@pytest.mark.parametrize("shares", [False, True])
def test_a_step_of_two_ranks_is_the_step_of_one(two, one, shares):
    report, grads, biases = (one["even"] if shares else one)["language"]
    for rank in two[1]:
        ours, our_grads, our_biases = (rank["shares"] if shares else rank)["language"]
        for name in ("loss", "mtp_loss", "balance_loss", "z_loss", "orthogonal_loss"):
            assert getattr(ours, name) == pytest.approx(getattr(report, name), abs=1e-6), name
        assert ours.norm == pytest.approx(report.norm, rel=1e-5)
        assert (ours.tokens, ours.learned, ours.load) == (report.tokens, report.learned, report.load)
        assert_same(our_grads, grads)
        assert_same(our_biases, biases, atol=0, rtol=0)
    assert any(bias.any() for bias in biases.values())


@pytest.mark.parametrize("shares", [False, True])
def test_a_step_with_pictures_is_that_of_one_process(two, one, shares):
    """Of two ranks one sees pictures and the other does not: losses, loads and biases of both modalities are those of all."""
    report, grads, biases = (one["even"] if shares else one)["pictures"]
    assert report.vision_tokens == (6 + 2) + (2 + 2) + (3 + 2)
    for rank in two[1]:
        ours, our_grads, our_biases = (rank["shares"] if shares else rank)["pictures"]
        names = ("loss", "vision_loss", "text_loss", "balance_loss", "z_loss", "orthogonal_loss")
        for name in (*names, "vision_balance_loss", "vision_z_loss", "vision_orthogonal_loss"):
            assert getattr(ours, name) == pytest.approx(getattr(report, name), abs=1e-6), name
        assert ours.norm == pytest.approx(report.norm, rel=1e-5)
        assert (ours.tokens, ours.vision_tokens, ours.load, ours.vision_load) == (
            report.tokens,
            report.vision_tokens,
            report.load,
            report.vision_load,
        )
        assert_same(our_grads, grads)
        assert_same(our_biases, biases, atol=0, rtol=0)
    assert any(bias.any() for name, bias in biases.items() if ".vision." in name)


def test_recompute_in_shares_changes_nothing(two):
    for rank in two[1]:
        report, grads = rank["shares"]["recompute"]
        assert report.loss == rank["shares"]["language"][0].loss
        assert_same(grads, rank["shares"]["language"][1], atol=0, rtol=0)


def test_a_rank_holds_its_share(two):
    assert all(0.5 <= rank["shares"]["held"] < 0.52 for rank in two[1])  # routers are whole


@pytest.mark.parametrize("shares", [False, True])
def test_pairs_are_shared_out_likewise(two, one, shares):
    report, grads = (one["even"] if shares else one)["preference"]
    for rank in two[1]:
        ours, our_grads = (rank["shares"] if shares else rank)["preference"]
        assert ours.loss == pytest.approx(report.loss, abs=1e-6)
        assert ours.margin == pytest.approx(report.margin, abs=1e-6)
        assert (ours.accuracy, ours.tokens, ours.learned) == (report.accuracy, report.tokens, report.learned)
        assert_same(our_grads, grads)


def test_all_ranks_refuse_what_one_cannot_learn(two):
    assert [rank["refused"] for rank in two[1]] == [(True, True)] * 2


def test_what_the_first_rank_cannot_do_ends_all(two):
    assert [rank["told"] for rank in two[1]] == ["the disk is full", "rank 0 ended: the disk is full"]


def test_the_held_out_loss_is_that_of_one_process(two):
    whole = facts.held_out(ALONE)
    assert [rank["held_out"] for rank in two[1]] == [pytest.approx([whole, whole], abs=1e-6)] * 2


def test_a_model_can_be_written_after_its_held_out_loss(two):
    for rank in two[1]:
        assert rank["shares"]["finished"][0] == rank["shares"]["held"]  # nothing stays put together
    assert_same(two[1][0]["shares"]["finished"][1], facts.moe().state_dict(), atol=0, rtol=0)


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


@pytest.fixture(scope="module")
def three(two, tmp_path_factory):
    """What two more steps of both runs give, by one process and by each of three ranks."""
    found = {}
    for world in (1, 3):
        folder = tmp_path_factory.mktemp(f"by-{world}")
        for name in ("run", "shares/run"):
            shutil.copytree(two[0] / name, folder / name)
        found[world] = [facts.go_on(ALONE, folder)] if world == 1 else results(facts.go_on, world, folder)
    return found


def test_a_run_goes_on_with_another_number_of_ranks(three, tmp_path):
    """Four steps by two ranks, then two by one or by three: the same data in the same order, the same losses."""
    whole, _, _, losses = facts.run(ALONE, tmp_path, 6)
    for ranks in three.values():
        assert [rank["run"][0] for rank in ranks] == [whole] * len(ranks)  # with the digest of what was read
        assert ranks[0]["run"][3] == pytest.approx(losses[4:], abs=1e-6)


def test_shares_are_cut_anew_when_a_run_goes_on(two, three, tmp_path):
    """Two steps of Muon with weights in two shares, then two more in one piece and in three shares."""
    whole, weights, average, losses = facts.run(ALONE, tmp_path, 4, kind="muon", accumulate=6)
    assert two[1][0]["shares"]["run"][3] == pytest.approx(losses[:2], abs=1e-6)
    for ranks in three.values():
        progress, our_weights, our_average, seen = ranks[0]["shares"]
        assert progress == whole
        assert seen == pytest.approx(losses[2:], abs=2e-6)
        # Muon brings every direction to length 1, those of rounding too
        assert_same(our_weights, weights, atol=2e-5, rtol=1e-3)
        assert_same(our_average, average, atol=2e-5, rtol=1e-3)


def test_shares_go_on_to_the_bit_after_held_out_losses(two):
    for rank in two[1]:
        (whole, weights), (stopped, again) = rank["shares"]["resumed"]
        assert stopped == whole
        for name, weight in weights.items():
            assert torch.equal(weight, again[name]), name
    assert len(two[1][0]["shares"]["resumed"][0][0]) == 2


def test_when_a_rank_is_killed_the_other_ends_with_a_reason(two, one, tmp_path):
    began = time.monotonic()
    (code, said), (killed, _) = wait(start(facts.dies, 2, tmp_path))
    assert time.monotonic() - began < 100
    assert killed == -signal.SIGKILL
    assert code == 2, said
    assert "RunError: rank 0 of 2 lost the others" in said
    first, *second = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert first == "step-00000002"  # the fifth step begins when it is whole, and maybe before the next one is
    assert second in ([], ["step-00000004"])
    progress, weights, _, _ = facts.run(ALONE, tmp_path / "run", 4)
    assert progress == one["run"][0]
    assert_same(weights, one["run"][1], atol=2e-6, rtol=1e-4)


def test_the_first_rank_says_samples_while_the_others_wait(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    losses, said = facts.sampled(ALONE, alone)
    assert len(said) == 4
    for ours, lines in results(facts.sampled, 2, tmp_path / "two"):
        assert ours == pytest.approx(losses, abs=1e-6)
        assert lines == said  # written once, by one of them


def test_a_rank_without_a_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--shard none"):
        train(None, None, facts.DATA, None, RunConfig(steps=1, accumulate=5), tmp_path, "f", ranks=Ranks(0, 4, sharded=True))
    with pytest.raises(ConfigError, match="set accumulate to 4"):
        train(None, None, facts.DATA, None, RunConfig(steps=1, accumulate=3), tmp_path, "f", ranks=Ranks(0, 4))


def test_a_launcher_that_miscounts_is_named(tmp_path):
    with pytest.raises(ConfigError, match="rank 2 of 2"), open_ranks(Environment(cache_dir=tmp_path, rank=2, world=2), 5.0):
        pass
    with pytest.raises(ConfigError, match="RANK is 'x'"):
        Environment.read({"RANK": "x", "WORLD_SIZE": "2"})
    assert Environment.read({"WORLD_SIZE": "2"}).world == 1
    with open_ranks(Environment(cache_dir=tmp_path), 5.0) as ranks:
        assert ranks is ALONE
