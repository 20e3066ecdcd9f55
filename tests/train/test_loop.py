"""Runs: killed and resumed they go on to the bit; folders are locked; broken checkpoints are told apart."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError, RunError
from ernie45.train import checkpoint_files
from ernie45.train.batch import Example
from ernie45.train.checkpoint import Checkpoints, fingerprint
from ernie45.train.examples import NO_HISTORY, PackedExamples, digest_after, digest_of, permutation
from ernie45.train.lock import locked
from ernie45.train.loop import LOG, RunConfig, train
from ernie45.train.optim import MovingAverage, Optimiser, OptimiserConfig
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples

SCHEDULE = ScheduleConfig(peak=3e-3, warmup=2, shape="cosine")
DATA = PackedExamples(make_examples([5, 9, 14, 7, 22, 3, 11, 8, 6], seed=3), limit=24, seed=1)


class Killed(Exception):
    """Stands for a kill between two steps."""


def run(folder, steps=12, kill_after=None, config=None, kind="adamw", fingerprint="f", **how):
    """A run of a tiny mixture of experts; returns progress and the log's losses, norms and loads."""
    decoder = make_decoder(experts=True)
    optimiser = Optimiser(decoder, OptimiserConfig(kind=kind), 32)
    learner = Step(decoder, optimiser, LossConfig(balance=1e-2, orthogonal=1e-2, bias_rate=1e-2))
    average = MovingAverage(optimiser, window=200)

    def on_report(report):
        if report.step == kill_after:
            raise Killed

    config = config or RunConfig(steps=steps, accumulate=2, save_every=4)
    progress = train(learner, decoder, DATA, SCHEDULE, config, folder, fingerprint, average=average, on_report=on_report, **how)
    return progress, decoder, average


def log_of(folder):
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "norm", "rate", "learned", "load")} for line in lines]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, kind):
    whole, decoder, average = run(tmp_path / "whole", kind=kind)
    with pytest.raises(Killed):
        run(tmp_path / "cut", kill_after=6, kind=kind)  # two steps after its checkpoint
    assert len(log_of(tmp_path / "cut")) == 7
    resumed, again, average_again = run(tmp_path / "cut", kind=kind)
    assert resumed == whole
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert len(log_of(tmp_path / "cut")) == 12
    for (name, a), b in zip(decoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, average_again.weights[name]) for name, a in average.weights.items())


def test_a_finished_run_does_nothing_more(tmp_path):
    first, _, _ = run(tmp_path, steps=4)
    log = (tmp_path / LOG).read_text()
    assert run(tmp_path, steps=4)[0] == first
    assert (tmp_path / LOG).read_text() == log


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    run(tmp_path, config=RunConfig(steps=9, save_every=2, keep=2))
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints", "f").list()] == ["step-00000008", "step-00000009"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from ernie45.train import checkpoint_files
real = checkpoint_files.write_safetensors
def write(folder, *args, **how):
    done = real(folder, *args, **how)
    if "step-00000008" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return done
checkpoint_files.write_safetensors = write
import torch; torch.set_num_threads(1)
from tests.train.test_loop import run
run(Path(sys.argv[1]))
"""


def test_a_kill_while_a_checkpoint_is_written_keeps_the_last_good_one(tmp_path, pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "cut")],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    folder = tmp_path / "cut" / "checkpoints"
    assert [path.name for path in Checkpoints(folder, "f").list()] == ["step-00000004"]
    assert list(folder.glob(".partial-*"))
    run(tmp_path / "cut")
    assert not list(folder.glob(".partial-*"))
    run(tmp_path / "whole")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_learning_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer waits until two more steps are done, and still writes the state of its own step."""
    later, real = threading.Event(), checkpoint_files.write_safetensors

    def slow(folder, *args, **how):
        if "step-00000004" in str(folder):
            assert later.wait(60)
        return real(folder, *args, **how)

    decoder = make_decoder(experts=True)
    optimiser = Optimiser(decoder, OptimiserConfig(), 32)
    learner = Step(decoder, optimiser, LossConfig(bias_rate=1e-2))
    seen = []

    def on_report(report):
        seen.append((report.step, [path.name for path in Checkpoints(tmp_path / "checkpoints", "f").list()]))
        if report.step == 5:
            later.set()
            raise Killed

    monkeypatch.setattr(checkpoint_files, "write_safetensors", slow)
    with pytest.raises(Killed):
        train(learner, decoder, DATA, SCHEDULE, RunConfig(steps=12, save_every=4), tmp_path, "f", on_report=on_report)
    assert seen[-1] == (5, [])
    again = make_decoder(experts=True, seed=1)
    assert Checkpoints(tmp_path / "checkpoints", "f").load_last(again, Optimiser(again, OptimiserConfig(), 32), None).step == 4
    whole = make_decoder(experts=True)
    learner = Step(whole, Optimiser(whole, OptimiserConfig(), 32), LossConfig(bias_rate=1e-2))
    for step in range(4):
        learner([DATA.batch(step)], step, SCHEDULE.at(step, 12))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("where", ["in the background", "at the end"])
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, where):
    bad, real = {"in the background": 8, "at the end": 12}[where], os.fsync

    def full(handle):
        if f"step-{bad:08d}" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=rf"disk became full.*the last whole checkpoint is .*step-{bad - 4:08d}"):
            run(tmp_path / "cut")
    assert not list((tmp_path / "cut" / "checkpoints").glob(".partial-*"))
    run(tmp_path / "cut")
    run(tmp_path / "whole")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(CheckpointError, match=r"the disk has 10 free.*there is no earlier checkpoint"):
        run(tmp_path)


def test_a_log_that_cannot_grow_ends_the_run_with_a_reason(tmp_path):
    decoder = make_decoder()
    learner = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())

    def full(report):
        if report.step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")

    with pytest.raises(RunError, match=r"log\.jsonl: cannot be written: No space left on device; the last whole .*step-00000002"):
        train(learner, decoder, DATA, SCHEDULE, RunConfig(steps=9, save_every=2), tmp_path, "f", on_report=full)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path), pytest.raises(RunError, match="another run is working"):
        run(tmp_path)


def test_a_lock_ends_with_its_process(tmp_path, pytestconfig):
    code = "import sys, time\nfrom pathlib import Path\nfrom ernie45.train.lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=pytestconfig.rootpath)
    with other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError), locked(tmp_path):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait(10)
    for _ in range(50):
        try:
            with locked(tmp_path):
                return
        except RunError:
            time.sleep(0.1)
    pytest.fail("the lock outlived its process")


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(RunError, match="other settings"):
        run(tmp_path, fingerprint="g")


@pytest.mark.parametrize("file", ["rank-0/model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    run(tmp_path, steps=4)
    path = tmp_path / "checkpoints" / "step-00000004" / file
    data = bytearray(path.read_bytes())
    data[-9] ^= 1 if file != "state.json" else 0xFF
    path.write_bytes(data)
    with pytest.raises(RunError, match=file):
        run(tmp_path)


def test_a_run_that_diverges_ends_with_a_reason(tmp_path):
    decoder = make_decoder()
    optimiser = Optimiser(decoder, OptimiserConfig(), 32)
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="5 steps in a row"):
        train(Step(decoder, optimiser, LossConfig()), decoder, DATA, SCHEDULE, RunConfig(steps=20), tmp_path, "f")
    assert not Checkpoints(tmp_path / "checkpoints", "f").list()


def test_run_settings_are_checked():
    with pytest.raises(ConfigError, match=r"run\.steps"):
        RunConfig(steps=0)


def test_every_epoch_has_each_example_once_in_another_order():
    counts = [sorted(n for pack in DATA.packs(epoch) for n in pack) for epoch in range(3)]
    assert counts == [list(range(9))] * 3
    assert DATA.packs(0) != DATA.packs(1)
    assert all(DATA.batch(n).num_tokens <= 24 for n in range(DATA.count(2)))


def test_a_batch_is_the_same_whoever_asks_first():
    fresh = PackedExamples(DATA.examples, limit=24, seed=1)
    assert torch.equal(fresh.batch(9).tokens_T, DATA.batch(9).tokens_T)
    assert torch.equal(fresh.batch(2).tokens_T, DATA.batch(2).tokens_T)
    other = PackedExamples(DATA.examples, limit=24, seed=2)
    assert [other.packs(0), other.packs(1)] != [DATA.packs(0), DATA.packs(1)]


def test_a_permutation_depends_on_its_key_alone():
    assert sorted(permutation(1000, 1, "a").tolist()) == list(range(1000))
    assert permutation(20, 7, 0).tolist() == permutation(20, 7, 0).tolist() != permutation(20, 7, 1).tolist()
    # a fixed value: orders must not change between versions, or a resumed run would see other data
    assert permutation(8, 42, 0).tolist() == [5, 6, 0, 4, 2, 1, 3, 7]


def test_the_digest_tells_histories_apart():
    first, second = DATA.batch(0), DATA.batch(1)
    one, two = digest_of(first), digest_of(second)
    assert digest_after(NO_HISTORY, [one, two]) == digest_after(digest_after(NO_HISTORY, [one]), [two])
    assert digest_after(NO_HISTORY, [one, two]) != digest_after(NO_HISTORY, [two, one])
    assert digest_of(first) != digest_of(replace(first, labels_T=first.labels_T + 1))


def test_a_fingerprint_does_not_depend_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_an_example_counts_what_is_learned():
    assert Example((1, 2, 3), (1, -100, 3)).learned == 1
