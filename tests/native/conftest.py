"""The native kernels for their tests. Tests build nothing: `make kernels` does, and `make test` calls it where there is a compiler."""

import os

import pytest

from ernie45.ops import native


@pytest.fixture(scope="session")
def kernels():
    """The best kernels of this machine. Missing ones are a failure under CI and a spoken skip elsewhere."""
    found = native.load(None, native.find_library())
    if found is None:
        message = "the native kernels are not installed; build them with `make kernels` (needs a C++20 compiler)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@pytest.fixture(params=native.NAMES)
def each(request, kernels):
    """The kernels of one instruction set after the other; what this machine cannot run is skipped by name."""
    if request.param not in kernels.available:
        pytest.skip(f"this machine cannot run the {request.param} kernels")
    return native.Native(request.param, kernels.available)
