"""What this machine has to give: cores, memory nodes, memory; and how threads and pages are put in their places."""

import ctypes
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CPUS, _NODES, _GROUP = Path("/sys/devices/system/cpu"), Path("/sys/devices/system/node"), Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")
_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_BYTES = 2 << 20
_ADVISE_HUGE, _COLLAPSE = 14, 25  # of madvise: pages to come, and (Linux 6.1) those that are there
_PREFERRED, _INTERLEAVED = 1, 3  # of set_mempolicy
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}


@dataclass(frozen=True)
class Core:
    """A physical core: those of its processors (hardware threads) that this process may use, and its memory node."""

    cpus: tuple[int, ...]
    node: int


@dataclass(frozen=True)
class Topology:
    """The cores this process may use, in order, how many of them the control group's quota pays for, and free bytes of each node."""

    cores: tuple[Core, ...]
    quota: int | None
    free: dict[int, int]

    @property
    def usable(self) -> int:
        """Cores that arithmetic may use at the same time."""
        return max(1, min(len(self.cores), self.quota or len(self.cores)))

    def seats(self, needed: int) -> tuple[Core, ...]:
        """The cores to compute on: of the node with most cores that has `needed` bytes free, all of them when none has."""
        nodes = sorted({core.node for core in self.cores}, key=lambda node: (-sum(core.node == node for core in self.cores), node))
        fitting = [node for node in nodes if self.free.get(node, 0) >= needed]
        if len(nodes) < 2 or not fitting:
            return self.cores
        return tuple(core for core in self.cores if core.node == fitting[0])


def allowed_cpus() -> tuple[int, ...]:
    """Processors in this process's affinity mask, in order."""
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return tuple(sorted(mask))


def read_topology(cpus: Path = _CPUS, nodes: Path = _NODES, group: Path = _GROUP, own: Path = _OWN_GROUP) -> Topology:
    """What the system says of the processors in this process's affinity mask.

    Two threads of one core share its multipliers, so the second one brings next to nothing and costs a place in every barrier. A system
    that says nothing of its cores counts each processor as one, and one that says nothing of nodes has one.
    """
    node_of: dict[int, int] = {}
    free: dict[int, int] = {}
    for folder in sorted(nodes.glob("node[0-9]*")):
        number = int(folder.name.removeprefix("node"))
        node_of |= dict.fromkeys(_listed(folder / "cpulist"), number)
        free[number] = _free_of(folder / "meminfo")
    shared: dict[tuple[str, str] | int, list[int]] = {}
    for cpu in allowed_cpus():
        shared.setdefault(_core_of(cpu, cpus), []).append(cpu)
    cores = tuple(Core(tuple(found), node_of.get(found[0], 0)) for found in shared.values())
    quotas = [quota for folder in _groups(group, own) if (quota := _quota(folder)) is not None]
    return Topology(cores, min(quotas, default=None), free)


def usable_cores() -> int:
    """Cores that arithmetic may use: physical ones inside the process's affinity mask, and no more than the quota pays for."""
    return read_topology().usable


def _listed(path: Path) -> list[int]:
    """Numbers of a list such as `0-3,8,10-11`; empty where there is none."""
    try:
        spans = [part.partition("-") for part in path.read_text().strip().split(",") if part]
        return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]
    except (OSError, ValueError):
        return []


def _free_of(path: Path) -> int:
    """Bytes of a node that are free or hold files that can be read again."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
        return sum(int(line[3]) * 1024 for line in words if line[2] in ("MemFree:", "FilePages:"))
    except (OSError, ValueError, IndexError):
        return 0


def _core_of(cpu: int, cpus: Path) -> tuple[str, str] | int:
    """Package and core of a processor; the processor itself where the system does not say."""
    try:
        package, core = ((cpus / f"cpu{cpu}" / "topology" / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return cpu
    return package, core


def _groups(root: Path, own: Path) -> list[Path]:
    """Folders of this process's control group and of those above it, as far as they are to be seen here; any of them may limit it."""
    try:
        mine = next(line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return [root]
    inner = root / mine
    return [inner, *inner.parents[: len(Path(mine).parts)]] if ".." not in Path(mine).parts else [root]


def _quota(group: Path) -> int | None:
    """Whole processors that the control group's quota pays for, rounded up; None without one."""
    try:
        words = (group / "cpu.max").read_text().split()
    except OSError:
        return None
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return max(1, -(-int(words[0]) // int(words[1])))


# ---- putting things in their places


def keep_to(cpus: Iterable[int], threads: Sequence[int] = ()) -> bool:
    """Lets `threads` (numbers of this process's, all of them when none is named) run on `cpus` only; False where that cannot be done.

    Threads that are started later inherit it from those that start them.
    """
    tasks = Path("/proc/self/task")
    chosen = set(cpus)
    if not chosen or not hasattr(os, "sched_setaffinity") or not tasks.exists():
        return False
    try:
        for thread in threads or [int(task.name) for task in tasks.iterdir()]:
            os.sched_setaffinity(thread, chosen)
    except OSError:  # a mask that the system does not allow any more, or a thread that has just ended
        return False
    return True


def place_memory(nodes: Sequence[int]) -> bool:
    """New memory of this process comes from a node while it has some, or from several in turn; False where the system cannot do it."""
    call = _SET_MEMPOLICY.get(platform.machine())
    if call is None or not nodes or max(nodes) > 62 or platform.system() != "Linux":
        return False
    mask = ctypes.c_ulong(sum(1 << node for node in set(nodes)))
    mode = _PREFERRED if len(nodes) == 1 else _INTERLEAVED
    return ctypes.CDLL(None).syscall(ctypes.c_long(call), ctypes.c_int(mode), ctypes.byref(mask), ctypes.c_ulong(64)) == 0


def huge_pages_allowed(path: Path = _HUGE) -> bool:
    """Whether the system gives pages of 2 MiB to those who ask."""
    try:
        return "[never]" not in path.read_text()
    except OSError:
        return False


def ask_huge_pages(address: int, size: int, *, filled: bool) -> int:
    """Asks for huge pages in a piece of memory, at once for what is `filled`; bytes that may have got them, 0 where the system says no.

    Whole pages of 2 MiB inside the piece can become huge; what lies around them stays as it is.
    """
    first = -(-address // _HUGE_BYTES) * _HUGE_BYTES
    length = (address + size) // _HUGE_BYTES * _HUGE_BYTES - first
    if length <= 0 or platform.system() != "Linux":
        return 0
    advise = ctypes.CDLL(None).madvise
    place = (ctypes.c_void_p(first), ctypes.c_size_t(length))
    if advise(*place, _ADVISE_HUGE) != 0:
        return 0
    if filled:
        advise(*place, _COLLAPSE)  # an older system does it by and by
    return length


# ---- memory


def available_memory(group: Path = _GROUP, own: Path = _OWN_GROUP) -> int:
    """Bytes this process may still take without swapping, inside the limits of its control groups."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    free = free or 4 << 30  # unknown systems: what a laptop can spare
    return min([free, *(left for folder in _groups(group, own) if (left := _left_in(folder)) is not None)])


def _left_in(group: Path) -> int | None:
    """Bytes that a control group still allows; None without a limit. Files that were read count as used, and are given back when asked."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").exists() else []
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
        return max(0, int(limit) - used + cached) if limit.isdigit() else None
    except (OSError, ValueError):
        return None
