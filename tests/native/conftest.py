"""The native kernels, one instruction set after the other. Tests build nothing: `make kernels` does, and `make test` calls it."""

import pytest

from ernie45.ops import native


@pytest.fixture(params=native.NAMES)
def each(request, kernels):
    """The kernels of one instruction set after the other; what this machine cannot run is skipped by name."""
    if request.param not in kernels.available:
        pytest.skip(f"this machine cannot run the {request.param} kernels")
    return native.Native(request.param, kernels.available)
