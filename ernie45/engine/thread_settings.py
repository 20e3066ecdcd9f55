"""Settings of the threads that compute: the same for `serve`, `chat`, `generate` and `bench latency`. No tensors here."""

from dataclasses import dataclass
from typing import Literal

from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ThreadSettings:
    """How many threads compute, where they sit, and in which pages weights lie. Raises `ConfigError` for a number below 1."""

    threads: int | Literal["auto", "measure"] = "auto"
    """Threads that compute; auto measures once for a model and a machine and keeps the choice, measure does it anew."""
    pin: Literal["off", "on"] = "off"
    """Keep each computing thread on a physical core of its own."""
    huge_pages: Literal["off", "on"] = "off"
    """Put weights into pages of 2 MiB, where the system allows it."""

    def __post_init__(self) -> None:
        if isinstance(self.threads, int) and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be auto, measure, or a number of at least 1")
