"""What only learning needs of the kernels: products of matrices in any layout, and the optimiser's step."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.ops import eager, reference
from ernie45.ops.optimise import AdamwNumbers, adamw, joined, parted

pytestmark = pytest.mark.native

odd = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sides = st.integers(33, 300)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid(matrix, by_rows, room):
    """The matrix by rows or by columns, inside of a larger one whose other numbers are none."""
    whole = torch.full((matrix.shape[0] + room, matrix.shape[1] + room), float("nan"), dtype=matrix.dtype)
    whole = whole if by_rows else whole.t().contiguous().t()
    inner = whole[: matrix.shape[0], : matrix.shape[1]]
    return inner.copy_(matrix)


@odd
@given(left=sides, right=sides, inner=st.integers(33, 2300), rows=st.tuples(st.booleans(), st.booleans()), room=st.integers(0, 40))
def test_products_are_exact_in_every_layout(kernels, left, right, inner, rows, room):
    a, b = random(left, inner).bfloat16(), random(inner, right, seed=1).bfloat16()
    expected = a.double() @ b.double()
    a, b = laid(a, rows[0], room), laid(b, rows[1], room)
    wide = kernels.wide_product(a, b)
    # sums of `inner` products of about 1 in float32, where torch computes in bfloat16 a rounding on top
    tolerance = 3e-6 * inner**0.5 if kernels.isa == "amx" else 2**-8 * expected.abs().max().item()
    torch.testing.assert_close(wide.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(kernels.wide_product(b.t(), a.t()), wide.t(), atol=2 * tolerance, rtol=0)
    sums = random(left, right, seed=2)
    added = sums.double() + expected
    kernels.add_product(sums, a, b)
    torch.testing.assert_close(sums.double(), added, atol=tolerance + 1e-5, rtol=0)


def test_threads_change_no_bit_of_a_product(kernels):
    a, b = random(700, 1500).bfloat16(), random(1500, 400, seed=1).bfloat16()
    held, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernels.wide_product(a, b))
    finally:
        torch.set_num_threads(held)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@odd
@given(tokens=st.integers(1, 200), in_size=st.integers(1, 150), out_size=st.integers(1, 150), bias=st.booleans())
def test_a_layer_learns_as_its_twin_does(each, tokens, in_size, out_size, bias):
    """bfloat16 on every instruction set, and sizes on both sides of the least that tiles take."""
    x, weight = random(tokens, in_size).bfloat16(), (random(out_size, in_size, seed=1) / in_size**0.5).bfloat16()
    pull = random(tokens, out_size, seed=2).bfloat16()
    own = [x.clone().requires_grad_(), weight.clone().requires_grad_()] + [random(out_size, seed=3).bfloat16().requires_grad_()] * bias
    twin = [tensor.detach().double().requires_grad_() for tensor in own]
    out = each.linear(*own)
    expected = reference.linear(*twin)
    out.backward(pull)
    expected.backward(pull.double())
    torch.testing.assert_close(out.double(), expected, atol=2**-6, rtol=2**-7)  # two roundings to bfloat16 where there is a bias
    for got, want in zip(own, twin, strict=True):
        scale = want.grad.abs().max().item()
        torch.testing.assert_close(got.grad.double(), want.grad, atol=2**-7 * scale, rtol=2**-8)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_costs_no_product(kernels, frozen, monkeypatch):
    x, weight = random(64, 64).bfloat16(), random(64, 64, seed=1).bfloat16()
    (weight if frozen == "x" else x).requires_grad_()
    calls = []
    monkeypatch.setattr(type(kernels), "product", lambda self, left, right: calls.append(0) or left @ right)
    kernels.linear(x, weight).sum().backward()
    assert len(calls) == (2 if kernels.isa == "amx" else 0)
    assert (x.grad is None) == (frozen == "x")


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_equals_its_twin(each, dtype, state):
    numbers = AdamwNumbers(0.3, 0.1, 0.95, 1e-3, 1.1, 1e-8, 1e-4, 7)
    weight, gradient = random(257, 513), random(257, 513, seed=1).to(dtype)
    mean, square = random(257, 513, seed=2).to(state), random(257, 513, seed=3).square().to(state)
    high, low = parted(weight) if dtype == torch.bfloat16 else (weight, None)
    sides = []
    for step in (adamw, each.adamw):
        held = [None if tensor is None else tensor.clone() for tensor in (high, low, gradient, mean, square)]
        step(*held, numbers)
        sides.append(held)
    (twin, twin_low, *twins), (own, own_low, *owns) = sides
    assert all(torch.equal(a, b) for a, b in zip(twins, owns, strict=True))  # both means to the bit, however they are rounded
    if low is not None:
        own, twin = joined(own, own_low), joined(twin, twin_low)
    # torch's root is off by its last bit now and then, and a step is at most 0.02 here
    torch.testing.assert_close(own, twin, atol=4e-9, rtol=1.2e-7)


def test_wrong_matrices_are_refused(kernels):
    a, b = random(40, 64).bfloat16(), random(64, 50).bfloat16()
    product = torch.ops.ernie45.matmul
    if kernels.isa != "amx":
        with pytest.raises(RuntimeError, match="multiply no matrices"):
            product(a, b, False, kernels.isa)
        return
    for left, right, says in (
        (a, b[:-1], "64 columns meets one of 63 rows"),
        (a.float(), b, "bfloat16 matrix"),
        (a, b[None], "must be matrices"),
        (a[:, ::2], b[:32], "by rows or by columns"),
        (a[:, :0], b[:0], "share no dimension"),
    ):
        with pytest.raises(RuntimeError, match=says):
            product(left, right, False, kernels.isa)
    with pytest.raises(RuntimeError, match="sums must be float32"):
        torch.ops.ernie45.add_matmul(torch.zeros(40, 49), a, b, kernels.isa)
    assert product(a[:0], b, False, kernels.isa).shape == (0, 50)
    torch.testing.assert_close(kernels.product(a[:, ::2], b[:32]), eager.linear(a[:, ::2], b[:32].t()), atol=2**-4, rtol=2**-7)


def test_wrong_tensors_of_a_step_are_refused(kernels):
    n = 48
    good = {"weight": torch.zeros(n), "low": None, "gradient": torch.zeros(n), "mean": torch.zeros(n), "square": torch.zeros(n)}
    for name, bad, says in (
        ("gradient", torch.zeros(n - 1), "the gradient must be 48 numbers"),
        ("gradient", torch.zeros(n, dtype=torch.float64), "the gradient must be"),
        ("low", torch.zeros(n, dtype=torch.int16), "the weight must be"),
        ("square", torch.zeros(n).bfloat16(), "the mean square must be"),
        ("mean", torch.zeros(2 * n)[::2], "the mean must be"),
    ):
        with pytest.raises(RuntimeError, match=says):
            torch.ops.ernie45.adamw(*(good | {name: bad}).values(), *AdamwNumbers(1, 0.1, 0.9, 1e-3, 1, 1e-8, 0, 1), kernels.isa)
