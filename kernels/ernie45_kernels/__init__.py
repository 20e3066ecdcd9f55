"""The compiled kernels of ernie45. `LIBRARY` is the shared library; `ernie45.ops.native` loads it, nothing else does."""

from pathlib import Path

LIBRARY = Path(__file__).parent / "kernels.so"
