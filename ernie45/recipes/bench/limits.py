"""What this machine can do at most, measured with products and sums that exist already: the ceiling over every figure of speed.

A limit here is the best that was seen. Nobody knows the fastest product for certain: a share above 100 % means that the limit was
measured too low.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie45 import ops
from ernie45.ops import PackedWeight

_M, _N, _K = 1024, 4096, 2048  # rows, outputs and inputs of the product that is timed
_READ_BYTES = 1 << 30  # far beyond any cache


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Read bandwidth in GB/s and peaks in 10^9 operations a second (a multiplication and an addition are two), with `threads` threads."""

    cpu: str
    threads: int
    torch: str
    kernels: str
    read_gb_per_s: float
    float32_gflops: float
    bfloat16_gflops: float
    int8_gops: float


def measure_limits(threads: int, repeats: int = 7) -> Limits:
    """Time a sum over 1 GiB and products of 1024 x 2048 x 4096, each the best of `repeats` after one to warm up; takes some seconds."""
    torch.set_num_threads(threads)
    read = read_bandwidth(repeats)
    work = 2 * _M * _N * _K / 1e9
    floats = {}
    for dtype in (torch.float32, torch.bfloat16):
        x_MK, w_NK = torch.randn(_M, _K).to(dtype), torch.randn(_N, _K).to(dtype)
        floats[dtype] = work / best_seconds(lambda x=x_MK, w=w_NK: torch.nn.functional.linear(x, w), repeats)
    return Limits(
        cpu=_cpu_name(),
        threads=threads,
        torch=torch.__version__,
        kernels=ops.describe(),
        read_gb_per_s=read,
        float32_gflops=floats[torch.float32],
        bfloat16_gflops=floats[torch.bfloat16],
        int8_gops=work / min(best_seconds(product, repeats) for product in _int8_products()),
    )


def read_bandwidth(repeats: int = 7) -> float:
    """GB/s in which the threads that torch uses now read memory, the best of `repeats` sums over 1 GiB; takes a second."""
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / best_seconds(data.sum, repeats) / 1e9


def float_peak(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    """Operations a second of a square product in `dtype`, on the threads that torch uses now: the best of `repeats`; takes a moment."""
    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_seconds(lambda: torch.nn.functional.linear(x, w), repeats)


def _int8_products() -> list[Callable[[], object]]:
    """torch's own product, and that of the native kernels where they are installed: the faster one counts."""
    x_MK, w_KN = torch.randint(-127, 127, (_M, _K), dtype=torch.int8), torch.randint(-127, 127, (_K, _N), dtype=torch.int8)
    products: list[Callable[[], object]] = [lambda: torch._int_mm(x_MK, w_KN)]
    if ops.KERNELS is not None:
        values = torch.randint(1, 256, (_N // 16, _K // 4, 64), dtype=torch.uint8)
        packed = PackedWeight(values, torch.full((_N // 16, 1, 16), 1e-3, dtype=torch.float16), 8, _N)
        rows_MK = torch.randn(_M, _K)
        products.append(lambda: ops.packed_linear(rows_MK, packed))
    return products


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
