"""What this machine can do at most, measured with stock torch in the same run as the peers: the floor under every figure."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def best_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Shortest of several runs after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(threads: int) -> dict[str, float | str | int]:
    """Read bandwidth in GB/s (a sum over 1 GiB) and matrix peaks in GFLOP/s (1024 x 2048 x 4096)."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    read = data.numel() * 4 / best_seconds(data.sum) / 1e9
    del data
    peaks = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(1024, 2048).to(dtype), torch.randn(4096, 2048).to(dtype)
        peaks[f"peak_{name}_gflops"] = 2 * 1024 * 2048 * 4096 / best_seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b)) / 1e9
    return {"cpu": _cpu_name(), "threads": threads, "torch": torch.__version__, "read_gb_per_s": read, **peaks}


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
