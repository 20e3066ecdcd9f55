"""What this machine has to give."""

import os
from pathlib import Path

_CPUS, _GROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")


def usable_cores(cpus: Path = _CPUS, group: Path = _GROUP) -> int:
    """Cores that arithmetic may use: physical ones inside the process's affinity mask, and no more than the control group's quota pays for.

    Two threads of one core share its multipliers, so the second one brings next to nothing and costs a place in every barrier. A system
    that says nothing of its cores counts each processor as one.
    """
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu, cpus) for cpu in mask}
    return max(1, min(len(cores), _quota(group) or len(cores)))


def _core_of(cpu: int, cpus: Path) -> tuple[str, str] | int:
    """Package and core of a processor; the processor itself where the system does not say."""
    try:
        package, core = ((cpus / f"cpu{cpu}" / "topology" / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return cpu
    return package, core


def _quota(group: Path) -> int | None:
    """Whole processors that the control group's quota pays for, rounded up; None without one."""
    try:
        words = (group / "cpu.max").read_text().split()
    except OSError:
        return None
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return max(1, -(-int(words[0]) // int(words[1])))


def available_memory() -> int:
    """Bytes this process may still take without swapping, inside its control group's limit when there is one."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    free = free or 4 << 30  # unknown systems: what a laptop can spare
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text()) + _cached()))
    return free


def _cached() -> int:
    """Bytes that the control group counts as used and the system gives back when asked: files that were read."""
    stat = Path("/sys/fs/cgroup/memory.stat")
    lines = stat.read_text().splitlines() if stat.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
