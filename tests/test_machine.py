"""Cores, nodes and quotas as containers and hyper-threading leave them, read from trees that are made up; silence breaks nothing."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie45 import machine as machine_module
from ernie45.machine import (
    Core,
    Topology,
    allowed_cpus,
    ask_huge_pages,
    available_memory,
    huge_pages_allowed,
    keep_to,
    place_memory,
    read_topology,
)


@pytest.fixture
def topology(tmp_path, monkeypatch):
    """The topology of a made-up tree: {processor: (package, core)}, {node: (list of processors, free KiB)}, an affinity mask, a quota."""

    def make(cpus, nodes=None, mask=None, quota=None):
        for cpu, (package, core) in cpus.items():
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "physical_package_id").write_text(f"{package}\n")
            (folder / "core_id").write_text(f"{core}\n")
        for node, (listed, free) in (nodes or {}).items():
            folder = tmp_path / "node" / f"node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{listed}\n")
            (folder / "meminfo").write_text(f"Node {node} MemTotal: 9 kB\nNode {node} MemFree: {free} kB\nNode {node} FilePages: 1 kB\n")
        (tmp_path / "group").mkdir()
        if quota is not None:
            (tmp_path / "group" / "cpu.max").write_text(quota)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(cpus) if mask is None else mask, raising=False)
        return read_topology(tmp_path / "cpu", tmp_path / "node", tmp_path / "group")

    return make


@pytest.fixture
def machine(topology):
    """Usable cores of one package of `cores` cores with `threads` each: the second threads come behind all first ones."""

    def make(cores, threads, mask=None, quota=None):
        return topology({cpu: (0, cpu % cores) for cpu in range(cores * threads)}, mask=mask, quota=quota).usable

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


# two sockets of two cores with two threads each, numbered as Linux does: all first threads, then all second ones
TWO_SOCKETS = {cpu: (cpu % 4 // 2, cpu % 2) for cpu in range(8)}
NODES = {0: ("0-1,4-5", 1000), 1: ("2-3,6-7", 4000)}


def test_hyper_threads_share_a_core_and_nodes_own_theirs(topology):
    found = topology(TWO_SOCKETS, NODES)
    assert found.cores == (Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1))
    assert (found.usable, found.quota) == (4, None)
    assert found.free == {0: 1001 * 1024, 1: 4001 * 1024}


def test_a_mask_with_holes_leaves_what_it_leaves(topology):
    found = topology(TWO_SOCKETS, NODES, mask={5, 2, 6, 7}, quota="300000 100000")
    assert found.cores == (Core((2, 6), 1), Core((5,), 0), Core((7,), 1))
    assert found.usable == 3


def test_the_node_with_most_cores_that_has_room_is_taken(topology):
    found = topology(TWO_SOCKETS, NODES, mask={0, 1, 2, 3, 4})
    assert [core.node for core in found.seats(500 * 1024)] == [0, 0], "both have room, as many cores: the first"
    assert [core.node for core in found.seats(2000 * 1024)] == [1, 1]
    assert [core.node for core in found.seats(9000 * 1024)] == [0, 0, 1, 1], "it fits into none: all of them"


def test_one_node_is_no_choice():
    one = Topology((Core((0,), 0), Core((1,), 0)), None, {0: 10})
    assert one.seats(5) == one.seats(50) == one.cores


@pytest.mark.parametrize("listed", ["", "nonsense", "3-", "0-1,x"])
def test_a_damaged_list_of_a_node_counts_as_none(topology, listed):
    assert [core.node for core in topology({0: (0, 0), 1: (0, 1)}, {3: (listed, 5)}).cores] == [0, 0]


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 7}, raising=False)
    found = read_topology(tmp_path, tmp_path, tmp_path)
    assert (found.usable, found.free) == (3, {})
    assert found.cores == (Core((0,), 0), Core((3,), 0), Core((7,), 0))
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert read_topology(tmp_path, tmp_path, tmp_path).usable == 1


@pytest.fixture
def groups(tmp_path):
    """Control groups: a root, a slice in it with a limit, and a service in that, where this process is said to be."""
    inner = tmp_path / "root" / "system.slice" / "ernie.service"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/system.slice/ernie.service\n")
    return tmp_path / "root", inner, tmp_path / "own"


def test_a_quota_of_any_group_above_counts(groups, monkeypatch, tmp_path):
    root, inner, own = groups
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert read_topology(tmp_path, tmp_path, root, own).quota is None
    (inner / "cpu.max").write_text("600000 100000")
    assert read_topology(tmp_path, tmp_path, root, own).quota == 6
    (inner.parent / "cpu.max").write_text("150000 100000")
    assert read_topology(tmp_path, tmp_path, root, own).usable == 2
    own.write_text("0::/../outside\n")
    assert read_topology(tmp_path, tmp_path, root, own).quota is None


def test_a_limit_of_memory_of_any_group_above_counts(groups):
    root, inner, own = groups
    free = available_memory(root, own)
    assert free > 2000
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("700\n")
    assert available_memory(root, own) > 2000
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("900\n")
    assert available_memory(root, own) == 100
    (inner.parent / "memory.stat").write_text("anon 500\ninactive_file 30\nactive_file 20\n")
    assert available_memory(root, own) == 150
    (inner.parent / "memory.current").write_text("2000\n")
    assert available_memory(root, own) == 0
    own.unlink()
    assert available_memory(root, own) > 2000


def in_a_process(code):
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.split()


def test_all_threads_of_a_process_keep_to_what_they_are_given():
    code = (
        "import os, threading; from ernie45.machine import keep_to; stop = threading.Event()\n"
        "threading.Thread(target=stop.wait, daemon=True).start()\n"
        "last = max(os.sched_getaffinity(0)); assert keep_to([last])\n"
        "print(last, *(next(iter(os.sched_getaffinity(int(task)))) for task in os.listdir('/proc/self/task'))); stop.set()"
    )
    last, *threads = in_a_process(code)
    assert threads == [last, last]


def test_what_cannot_be_kept_to_is_said_and_changes_nothing(monkeypatch):
    before = os.sched_getaffinity(0)
    assert not keep_to([])
    assert not keep_to([1 << 14])
    assert os.sched_getaffinity(0) == before == set(allowed_cpus())
    monkeypatch.delattr("os.sched_setaffinity")
    assert not keep_to([0])


def test_the_memory_of_a_process_comes_from_the_node_it_was_told():
    """Read back by the system call that answers to the one that sets: mode 1, a preferred node, or 3, in turn."""
    code = (
        "import ctypes; from ernie45.machine import place_memory, platform\n"
        "mode, mask = ctypes.c_int(), ctypes.c_ulong()\n"
        "for nodes in ([0], [0, 0]):\n"
        "    done = place_memory(nodes)\n"
        "    number = 239 if platform.machine() == 'x86_64' else 236\n"
        "    ctypes.CDLL(None).syscall(number, ctypes.byref(mode), ctypes.byref(mask), 64, None, 0)\n"
        "    print(done, mode.value, mask.value)"
    )
    assert in_a_process(code) == ["True", "1", "1", "True", "3", "1"]


def test_a_node_that_is_not_there_or_a_foreign_system_is_refused(monkeypatch):
    assert not place_memory([])
    assert not place_memory([63])
    monkeypatch.setattr(machine_module.platform, "machine", lambda: "riscv64")
    assert not place_memory([0])


def test_huge_pages_are_asked_for_and_come(tmp_path):
    """Linux with huge pages for those who ask: the process's own account has them afterwards."""
    (tmp_path / "never").write_text("always madvise [never]\n")
    assert not huge_pages_allowed(tmp_path / "never")
    assert not huge_pages_allowed(tmp_path / "missing")
    code = (
        "import ctypes, mmap; from ernie45.machine import ask_huge_pages, huge_pages_allowed\n"
        "area = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); area.write(b'x' * (16 << 20))\n"
        "asked = ask_huge_pages(ctypes.addressof(ctypes.c_char.from_buffer(area)), 16 << 20, filled=True)\n"
        "got = sum(int(line.split()[1]) for line in open('/proc/self/smaps') if line.startswith('AnonHugePages'))\n"
        "print(huge_pages_allowed(), asked >> 20, got >> 10)"
    )
    allowed, asked, got = in_a_process(code)
    assert int(asked) in ((14, 16) if allowed == "True" else (0, 14, 16))
    assert (int(got) >= 14) == (allowed == "True")


def test_a_small_piece_of_memory_has_no_huge_page():
    assert ask_huge_pages(4096, mmap.PAGESIZE, filled=True) == 0
    assert Path("/proc").exists() or ask_huge_pages(0, 1 << 30, filled=False) == 0
