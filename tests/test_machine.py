"""Cores are counted as containers and hyper-threading leave them, and a system that says nothing does not break it."""

import pytest

from ernie45.machine import usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of `cores` cores with `threads` each, of which the process may use `mask`, under a quota."""

    def make(cores, threads, mask=None, quota=None):
        for cpu in range(cores * threads):
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "physical_package_id").write_text("0\n")
            (folder / "core_id").write_text(f"{cpu % cores}\n")
        (tmp_path / "group").mkdir()
        if quota is not None:
            (tmp_path / "group" / "cpu.max").write_text(quota)
        allowed = set(range(cores * threads)) if mask is None else mask
        monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
        return usable_cores(tmp_path / "cpu", tmp_path / "group")

    return make


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"cores": 4, "threads": 2}, 4),
        ({"cores": 4, "threads": 1}, 4),
        ({"cores": 4, "threads": 2, "mask": {0, 4}}, 1),
        ({"cores": 4, "threads": 2, "mask": {1, 2, 6}}, 2),
        ({"cores": 8, "threads": 2, "quota": "250000 100000"}, 3),
        ({"cores": 8, "threads": 2, "quota": "10000 100000"}, 1),
        ({"cores": 2, "threads": 1, "quota": "800000 100000"}, 2),
        ({"cores": 2, "threads": 1, "quota": "max 100000"}, 2),
        ({"cores": 2, "threads": 1, "quota": "nonsense"}, 2),
        ({"cores": 2, "threads": 1, "quota": "100000 0"}, 2),
    ],
    ids=str,
)
def test_cores(machine, how, wanted):
    assert machine(**how) == wanted


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 7}, raising=False)
    assert usable_cores(tmp_path, tmp_path) == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores(tmp_path, tmp_path) == 1
