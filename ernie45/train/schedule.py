"""The learning rate as a function of the step: no state, so that a resumed run cannot differ.

Shapes and defaults: ERNIE 4.5 technical report and the published pre-training files (warm-up, steady, decay).
"""

import math
from dataclasses import dataclass
from typing import Literal

from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the run. It rises from 0 to `peak` over `warmup` steps, then follows `shape`."""

    peak: float = 1e-5
    """Largest learning rate."""
    end: float = 0.0
    """Learning rate at the last step, except with `constant`."""
    warmup: int = 0
    """Steps of warm-up."""
    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """What follows the warm-up; wsd is steady, then a decay."""
    steady: float = 0.9
    """With wsd: share of all steps, warm-up included, before the decay begins."""
    decay: Literal["1-sqrt", "half-life"] = "half-life"
    """With wsd: form of the decay."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ConfigError(f"schedule.peak must be a number above 0, not {self.peak}")
        if not 0 <= self.end <= self.peak:
            raise ConfigError(f"schedule.end must lie between 0 and the peak {self.peak}, not {self.end}")
        if self.warmup < 0:
            raise ConfigError(f"schedule.warmup must be 0 steps or more, not {self.warmup}")
        if not 0 <= self.steady <= 1:
            raise ConfigError(f"schedule.steady must be a share between 0 and 1, not {self.steady}")

    def at(self, step: int, total: int) -> float:
        """The learning rate of step `step` (from 0) of `total`."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return self.peak
        first = max(self.warmup, round(self.steady * total)) if self.shape == "wsd" else self.warmup
        q = min(1.0, max(0.0, (step - first) / max(1, total - first)))
        return self.end + (self.peak - self.end) * self._left(q)

    def _left(self, q: float) -> float:
        """Share of the way from `end` to `peak` that is left after share `q` of the decay."""
        if self.shape == "linear":
            return 1.0 - q
        if self.shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * q))
        return 1.0 - math.sqrt(q) if self.decay == "1-sqrt" else (0.05**q - 0.05) / 0.95
