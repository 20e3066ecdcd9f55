"""Files as memory, for readers of either format."""

import mmap
import platform
import sys

# The system's flag, which Python names only in later versions; other machines than these number it otherwise.
_PLAIN_LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _PLAIN_LINUX else 0)


def map_privately(descriptor: int) -> mmap.mmap:
    """A writable mapping of a whole file whose writes never reach it: torch wants writable memory.

    Without a reservation where that can be asked for: Linux refuses a private mapping larger than its memory otherwise, and one file may
    hold such a model. Raises `OSError` as `mmap` does.
    """
    if not _NO_RESERVE:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
