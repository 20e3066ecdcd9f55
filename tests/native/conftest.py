"""The native kernels, one instruction set after the other. Tests build nothing: `make kernels` does, and `make test` calls it."""

import pytest

from ernie45.ops import native


def pytest_generate_tests(metafunc):
    """A test that takes `each` runs once for every instruction set of this machine; without kernels once, and `kernels` says why not."""
    if "each" in metafunc.fixturenames:
        found = native.load(None, native.find_library())
        metafunc.parametrize("each", found.available if found else ("none",), indirect=True)


@pytest.fixture
def each(request, kernels):
    """The kernels of one instruction set after the other."""
    return native.Native(request.param, kernels.available)
