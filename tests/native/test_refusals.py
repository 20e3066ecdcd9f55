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


HUGE = 2**62  # products and sums of it overflow: a check that computes with them would let it through


def good_calls() -> dict[str, tuple[object, list[object]]]:
    """Every operator on single layers with arguments that it takes."""
    packed = pack(torch.ones(96, 64, dtype=torch.int8), torch.ones(96, 2), 4, 32)
    down = pack(torch.ones(64, 48, dtype=torch.int8), torch.ones(64, 1), 4, 0)
    x, norm, whole, isa = torch.ones(3, 64), torch.ones(64), torch.ones(5, 64).bfloat16(), "plain"
    ops, cache = torch.ops.ernie45, torch.ones(8, 1, 16)
    return {
        "linear": (ops.linear, [x, norm, 1e-5, packed.values, packed.scales, 4, 96, torch.ones(3, 96), isa]),
        "qkv": (ops.qkv, [x, norm, 1e-5, packed.values, packed.scales, 4, torch.ones(3, 8, 2), 4, 1, 16, isa]),
        "feed_forward": (ops.feed_forward, [x, norm, 1e-5, packed.values, packed.scales, 4, down.values, down.scales, 4, 48, isa]),
        "bf16_linear": (ops.bf16_linear, [x, whole, isa]),
        "paged_attention": (ops.paged_attention, [torch.ones(1, 2, 16), cache, cache, torch.tensor([[1]]), torch.tensor([3]), 4, isa]),
        "rms_norm": (ops.rms_norm, [x, norm, 1e-5, isa]),
        "rotate": (ops.rotate, [x, torch.ones(3, 8, 2), isa]),
        "swiglu": (ops.swiglu, [x, isa]),
        "network": (ops.network, [norm, 1e-5, 2, 50, 4, 2, 16]),
    }


def spoiled(value):
    """What may come in place of an argument: for tensors other types, shapes and strides, for numbers none that exist."""
    if isinstance(value, torch.Tensor):
        yield "double", value.double()
        yield "bool", value.bool()
        yield "complex", value.to(torch.complex64)
        if value.dim() > 1:
            yield "flat", value.flatten()
        yield "deeper", value[None]
        yield "longer", torch.cat([value, value])
        yield "empty", value[:0]
        if value.dim() > 1 and min(value.shape) > 1:
            yield "turned", value.transpose(0, -1)
            yield "wider", torch.cat([value, value], -1)
    elif isinstance(value, int):
        yield from ((str(n), n) for n in (0, -1, -16, 7, HUGE, HUGE + 16, -HUGE, 2**63 - 1, -(2**63)))


# What an operator takes though it is strange: more, fewer or no rows give as many results, an empty matrix has no outputs, and a norm
# [1, D] is one.
TAKEN = {
    ("linear", 1): {"deeper"},
    ("qkv", 1): {"deeper"},
    ("feed_forward", 0): {"longer", "empty"},
    ("feed_forward", 1): {"deeper"},
    ("bf16_linear", 0): {"longer", "empty"},
    ("bf16_linear", 1): {"longer", "empty"},
    ("rms_norm", 0): {"longer", "empty"},
    ("rms_norm", 1): {"deeper"},
    ("rotate", 0): {"wider"},
    ("swiglu", 0): {"longer", "empty", "wider"},
    ("network", 0): {"longer"},
    ("network", 2): {"7"},
    ("network", 3): {"7", str(HUGE), str(HUGE + 16), str(2**63 - 1)},
}


@pytest.mark.native
@pytest.mark.parametrize("name", list(good_calls()))
def test_every_argument_spoiled_is_refused_or_harmless(kernels, name):
    operator, arguments = good_calls()[name]
    operator(*arguments)
    for at, argument in enumerate(arguments):
        for kind, bad in spoiled(argument):
            call = [*arguments[:at], bad, *arguments[at + 1 :]]
            try:
                operator(*call)
                taken = True
            except (RuntimeError, NotImplementedError):
                taken = False
            assert taken == (kind in TAKEN.get((name, at), ())), f"argument {at}, {kind}"


@pytest.mark.native
@pytest.mark.parametrize(
    ("page", "length", "size"), [(HUGE, 3, 4), (2**60, 3, 16), (1, HUGE, 4), (1, 2**63 - 1, 4), (1, -3, 4), (1, 3, HUGE)]
)
def test_pages_whose_place_overflows(kernels, page, length, size):
    slots = torch.zeros(8, 1, 16)
    with pytest.raises(RuntimeError, match=r"page|length"):
        kernels.paged_attention(torch.zeros(1, 1, 16), slots, slots, torch.tensor([[page]]), torch.tensor([length]), size)


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
