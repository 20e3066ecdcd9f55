"""What this machine has to give."""

from pathlib import Path


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
