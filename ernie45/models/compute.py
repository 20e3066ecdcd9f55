"""Which number type a model computes in, decided once and with its reason, so that it can be printed."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie45.errors import ConfigError, did_you_mean

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_CHOICES = ("auto", *CHOICES)


@dataclass(frozen=True)
class ComputeType:
    """The type weights are held and multiplied in, and why. The router is float32 whatever this says."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """`float32` or `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_compute(asked: str, stored: torch.dtype, *, fast_bfloat16: bool, coarse: bool = False) -> ComputeType:
    """Resolve `asked` ("auto", "float32" or "bfloat16") for weights stored as `stored`.

    Auto keeps bfloat16 where the CPU multiplies it in hardware and takes float32 everywhere else: emulated bfloat16 is several times
    slower than float32, and float16 has no fast path on CPUs and a small range. `coarse`: matrices round what they read to 8 bits, so that
    bfloat16 between them loses nothing that could be measured (benchmarks/README.md). Raises ConfigError for any other word.
    """
    kept = str(stored).removeprefix("torch.")
    if asked in CHOICES:
        return ComputeType(CHOICES[asked], f"as asked; stored as {kept}")
    if asked != "auto":
        raise ConfigError(f"dtype '{asked}' cannot be computed in{did_you_mean(asked, ALL_CHOICES)}")
    if coarse and fast_bfloat16:
        return ComputeType(torch.bfloat16, "matrices round activations to 8 bits, and this CPU multiplies bfloat16 in hardware")
    if stored != torch.bfloat16:
        return ComputeType(torch.float32, f"stored as {kept}")
    if fast_bfloat16:
        return ComputeType(torch.bfloat16, "stored so, and this CPU multiplies bfloat16 in hardware")
    return ComputeType(torch.float32, "stored as bfloat16, which this CPU has no instructions for")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX on x86, the bf16 extension on Linux ARM."""
    if platform.machine() in ("aarch64", "arm64"):
        described = Path("/proc/cpuinfo")
        return described.exists() and " bf16" in described.read_text(encoding="utf-8", errors="replace")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
