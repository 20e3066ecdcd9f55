"""Threads are chosen, kept and seated as it is said: settings, measuring with made-up times, and real threads on the cores asked for."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch

from ernie45.config import from_mapping
from ernie45.engine import threads as module
from ernie45.engine.client import LLM
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.engine.threads import Crew, Kept, Measured, measure_threads
from ernie45.errors import ConfigError
from ernie45.machine import Core, Topology
from tests.engine.test_engine import DENSE, EXPERTS, build

FOUR = Topology(tuple(Core((cpu, cpu + 4), 0) for cpu in range(4)), None, {0: 1 << 40})


@pytest.fixture(autouse=True)
def own_threads():
    """Every test leaves torch's threads as it found them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def decoder():
    return build(DENSE)


def times(monkeypatch, of):
    """Trials take what `of` says for a number of threads: seconds to read, seconds to write a token."""
    monkeypatch.setattr(module, "_trial", lambda decoder: of[torch.get_num_threads()])


@pytest.mark.parametrize("threads", ["auto", "measure", 1, 64])
def test_settings_come_from_a_table(threads):
    assert from_mapping(ThreadSettings, {"threads": threads, "pin": "on"}, "engine").threads == threads


@pytest.mark.parametrize(("data", "says"), [({"threads": 0}, "threads is 0"), ({"threads": "many"}, "many"), ({"pin": "yes"}, "pin"),
                                            ({"huge_pages": True}, "huge_pages")])  # fmt: skip
def test_wrong_settings_are_refused_by_name(data, says):
    with pytest.raises(ConfigError, match=says):
        from_mapping(ThreadSettings, data, "engine")


@pytest.mark.parametrize(
    ("of", "chosen"),
    [
        ({4: (0.01, 0.010), 3: (0.013, 0.010), 2: (0.02, 0.010), 1: (0.04, 0.02)}, 4),
        ({4: (0.05, 0.09), 3: (0.013, 0.010), 2: (0.02, 0.010), 1: (0.04, 0.02)}, 3),
        ({4: (0.04, 0.30), 3: (0.04, 0.30), 2: (0.04, 0.30), 1: (0.04, 0.01)}, 1),
        ({4: (0.0100, 0.0102), 3: (0.0100, 0.0100), 2: (0.02, 0.02), 1: (0.04, 0.04)}, 4),
    ],
    ids=["more is better", "a neighbour takes one", "alone is best", "equal but for noise: more"],
)
def test_the_best_of_reading_and_writing_is_chosen(decoder, monkeypatch, of, chosen):
    times(monkeypatch, of)
    monkeypatch.setattr(module._OthersTime, "share", lambda self: 0.0)
    found = measure_threads(decoder, 4, seconds=0.3)
    assert found.threads == chosen
    assert f"{chosen}: {1000 * of[chosen][1]:.1f} ms a token" in found.reason


def test_a_busy_machine_and_a_slow_model_are_not_measured(decoder, monkeypatch):
    times(monkeypatch, dict.fromkeys(range(1, 5), (0.01, 0.01)))
    monkeypatch.setattr(module._OthersTime, "share", lambda self: 1.0)
    assert measure_threads(decoder, 4, seconds=0.3) == Measured(None, "other work keeps the cores busy")
    clock = count(step=1.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert "more than 2 s" in measure_threads(decoder, 4, seconds=1.0).reason


def test_a_real_measurement_is_bounded(decoder, monkeypatch):
    monkeypatch.setattr(module._OthersTime, "share", lambda self: 0.0)
    began = module.time.perf_counter()
    assert measure_threads(decoder, 2, seconds=1.0).threads in (1, 2)
    assert module.time.perf_counter() - began < 20, "a second, and a last round; much more only where other work holds it up"


def test_a_choice_is_kept_for_a_model_and_a_machine_and_measured_anew_when_asked(decoder, monkeypatch, tmp_path):
    torch.set_num_threads(4)
    asked = []

    def measure(decoder, most):
        asked.append(most)
        return Measured(3, "measured")

    monkeypatch.setattr(module, "measure_threads", measure)

    def seat(threads="auto", name="a", network=decoder):
        torch.set_num_threads(4)
        return Crew(ThreadSettings(threads=threads), topology=FOUR, cache=tmp_path).after_loading(network, name)

    assert seat().text() == "3 (measured), not pinned; one memory node"
    assert seat().reason == "measured at an earlier start, of 4 cores"
    assert asked == [4]
    assert seat("measure").threads == 3
    assert seat(name="b").threads == 3
    assert seat(network=build(EXPERTS)).threads == 3
    assert asked == [4] * 4
    assert (seat(2).threads, seat(2).reason, torch.get_num_threads()) == (2, "as asked", 2)
    assert asked == [4] * 4


@pytest.mark.parametrize("content", ["", "[]", "nonsense", '{"KEY": 99}', '{"KEY": "3"}', '{"KEY": true}'])
def test_a_damaged_file_of_choices_is_done_without(decoder, tmp_path, content):
    kept = Kept(tmp_path, decoder, "model", 4)
    (tmp_path / "threads.json").write_text(content.replace("KEY", kept._key))
    assert kept.read() is None
    kept.write(2)
    assert kept.read() == 2
    for n in range(300):
        Kept(tmp_path, decoder, str(n), 4).write(1)
    assert len(json.loads((tmp_path / "threads.json").read_text())) <= 201


def test_a_folder_that_cannot_be_written_is_no_error(decoder, tmp_path):
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file", decoder, "model", 4)
    kept.write(2)
    assert kept.read() is None


def test_omp_num_threads_and_the_quota_bound_the_choice(decoder, monkeypatch):
    monkeypatch.setattr(module, "measure_threads", lambda decoder, most: Measured(most, "measured"))
    torch.set_num_threads(2)
    assert Crew(ThreadSettings(), topology=FOUR).after_loading(decoder).threads == 2
    torch.set_num_threads(4)
    assert Crew(ThreadSettings(), topology=Topology(FOUR.cores, 3, {})).after_loading(decoder).threads == 3
    torch.set_num_threads(4)
    one = Crew(ThreadSettings(), topology=Topology(FOUR.cores, 1, {})).after_loading(decoder)
    assert (one.threads, one.reason) == (1, "1 usable core")


def test_nodes_are_chosen_before_weights_are_read(decoder, monkeypatch):
    """On made-up nodes: no machine with several has run this."""
    placed, kept = [], []
    monkeypatch.setattr(module, "place_memory", lambda nodes: placed.append(nodes) or True)
    monkeypatch.setattr(module, "keep_to", lambda cpus, threads=(): kept.append(set(cpus)) or True)
    two = Topology((Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1)), None, {0: 10, 1: 100})
    crew = Crew(ThreadSettings(threads=2), topology=two)
    crew.before_loading(50)
    assert (placed, kept) == ([[1]], [{2, 3, 6, 7}])
    assert crew.after_loading(decoder).nodes == "memory node 1 of 2, where it fits"
    crew = Crew(ThreadSettings(threads=4), topology=two)
    crew.before_loading(500)
    assert placed[1:] == [[0, 1]]
    assert len(kept) == 1
    assert crew.after_loading(decoder).nodes == "memory of 2 nodes in turn"


SEATED = """
import os, sys, torch
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.engine.threads import Crew, pool_threads
from tests.engine.test_engine import DENSE, build
cpus = sorted(os.sched_getaffinity(0))
wanted = int(sys.argv[1])
seating = Crew(ThreadSettings(threads=wanted, pin="on", huge_pages="on")).after_loading(build(DENSE))
torch.ones(1 << 22).sum(), torch.ones(256, 256) @ torch.ones(256, 256)
def allowed(task):
    lines = open(f"/proc/self/task/{task}/status").read().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))
print(len(cpus), seating.threads, *seating.cpus, "|", *map(allowed, pool_threads()))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_sit_on_the_cores_asked_for(threads):
    """By the system's own account of each thread of the pool, after torch has computed with it."""
    ran = subprocess.run([sys.executable, "-c", SEATED, str(threads)], capture_output=True, text=True, check=True)
    told, allowed = ran.stdout.split("|")
    cpus, count, *seats = told.split()
    assert int(count) == threads
    if int(cpus) < threads:
        assert seats == [], "more threads than cores are not pinned"
    else:
        assert allowed.split() == seats
        assert len(set(seats)) == threads


def test_a_library_that_uses_an_llm_keeps_its_threads(decoder):
    before = torch.get_num_threads()
    llm = LLM(decoder, num_pages=8, max_length=32)
    assert (llm.seating, torch.get_num_threads()) == (None, before)
    assert llm.settings()["threads"] == str(before)
    llm = LLM(decoder, num_pages=8, max_length=32, threads=ThreadSettings(threads=1, huge_pages="on"))
    assert torch.get_num_threads() == 1
    assert llm.settings()["threads"].startswith("1 (as asked), not pinned; one memory node; huge pages")
    assert len(llm.generate([[1, 2, 3]])) == 1
