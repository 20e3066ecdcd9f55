"""What the operators and the choice of kernels refuse: behind the checks there are only pointers."""

import pytest
import torch

from ernie45.errors import ConfigError
from ernie45.ops import native
from ernie45.ops.quantised import PackedWeight
from ernie45.quant.pack import pack


@pytest.fixture
def weight():
    return pack(torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 2), 4, 32)


@pytest.mark.native
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 5}, "4 or 8 bits"),
        ({"bits": 8}, "do not fall into 2 groups"),
        ({"out_size": 33}, "do not hold 33 rows"),
        ({"out_size": 0}, "do not hold 0 rows"),
        ({"scales": torch.ones(2, 3, 16, dtype=torch.float16)}, "groups"),
        ({"scales": torch.ones(2, 2, 16)}, "float16"),
        ({"values": torch.zeros(2, 8, 32, dtype=torch.uint8)}, "uint8"),
    ],
)
def test_a_wrong_weight(kernels, weight, change, word):
    with pytest.raises(RuntimeError, match=word):
        kernels.packed_linear(torch.ones(1, 64), PackedWeight(**{**weight._asdict(), **change}))


@pytest.mark.native
@pytest.mark.parametrize("x", [torch.ones(1, 65), torch.ones(64), torch.ones(1, 64, dtype=torch.float64), torch.ones(64, 64).t()[:, ::2]])
def test_wrong_activations(kernels, weight, x):
    with pytest.raises(RuntimeError):
        kernels.packed_linear(x, weight)


@pytest.mark.native
@pytest.mark.parametrize(("page", "length"), [(2, 3), (-1, 3), (1, 5), (1, 0)])
def test_pages_outside_the_cache(kernels, page, length):
    slots = torch.zeros(8, 1, 16)
    with pytest.raises(RuntimeError, match=r"page|length"):
        kernels.paged_attention(torch.zeros(1, 1, 16), slots, slots, torch.tensor([[page]]), torch.tensor([length]), 4)


@pytest.mark.native
def test_unknown_kernels(kernels):
    with pytest.raises(RuntimeError, match="it can run"):
        native.Native("sse9", kernels.available).packed_linear(
            torch.ones(1, 64), pack(torch.ones(16, 64, dtype=torch.int8), torch.ones(16, 1), 4, 64)
        )
    for missing in set(native.NAMES) - set(kernels.available):
        with pytest.raises(ConfigError, match="cannot run"):
            native.load(missing, native.find_library())


def test_the_word_for_the_instruction_set_is_checked():
    with pytest.raises(ConfigError, match="avx512"):
        native.load("avx51", None)
    with pytest.raises(ConfigError, match="make kernels"):
        native.load("avx512", None)
    assert native.load(None, None) is None
    assert native.load("python", None) is None
