"""Packed products, fused layers, attention and bfloat16 products against their plain twins, for every instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.ops import native, quantised, reference
from ernie45.ops.quantised import PackedWeight
from ernie45.quant.pack import group_width, pack

pytestmark = pytest.mark.native

# Sums of integers are exact on both sides; the twin adds the groups in float64, the kernel in float32: a few roundings of 6e-8 each.
EXACT = {"rtol": 2e-6, "atol": 2e-6}
# Quantised activations fall on either side of a half when their float32 inputs differ in the last place: one step of 1/127 in one of a
# few hundred terms. Norms, exponentials and later layers make such differences.
STEP = {"rtol": 2e-2, "atol": 2e-2}
# One bfloat16 step is 2 ** -8 and may pass through such a half as well.
BF16 = {"rtol": 3e-2, "atol": 3e-2}

odd = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(out_size, in_size, bits, group, hadamard=False, seed=1, float_inputs=False) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    whole = torch.randint(low, high, (out_size, in_size), generator=generator).to(torch.int8)
    groups = -(-in_size // group_width(in_size, group))
    # weights of about 1 / sqrt(I): outputs near one
    scales = (torch.rand(out_size, groups, generator=generator) + 0.5) / (in_size**0.5 * high / 2)
    return pack(whole, scales, bits, group, hadamard=hadamard, float_inputs=float_inputs)


def turns(tokens, size):
    return torch.polar(torch.ones(tokens, size // 2), random(tokens, size // 2, seed=9))


shapes = {
    "rows": st.integers(1, 40),
    "out_size": st.integers(1, 150),
    "in_size": st.integers(1, 300),
    "bits": st.sampled_from([4, 8]),
    "group": st.sampled_from([0, 32, 64, 128]),
    "hadamard": st.booleans(),
}


@odd
@given(**shapes, bf16=st.booleans())
def test_a_product_equals_its_twin(each, rows, out_size, in_size, bits, group, hadamard, bf16):
    x, weight = random(rows, in_size), packed(out_size, in_size, bits, group, hadamard)
    if bf16:
        x = x.bfloat16()
    got, want = each.packed_linear(x, weight), quantised.packed_linear(x, weight)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, want, **({"rtol": 8e-3, "atol": 1e-3} if bf16 else EXACT))  # bfloat16: one step of the result


@odd
@given(**shapes)
def test_all_instruction_sets_and_batch_sizes_give_the_same_bits(kernels, rows, out_size, in_size, bits, group, hadamard):
    x, weight = random(rows, in_size), packed(out_size, in_size, bits, group, hadamard)
    results = [native.Native(isa, kernels.available).packed_linear(x, weight) for isa in kernels.available]
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = torch.cat([kernels.packed_linear(row[None], weight) for row in x])
    assert torch.equal(results[0], alone), "a row's result must not depend on the rows beside it"


@odd
@given(**shapes, bf16=st.booleans())
def test_float_activations_are_not_rounded_and_stand_alone(each, rows, out_size, in_size, bits, group, hadamard, bf16):
    """Against the float64 twin: as near as float32 sums of a few hundred terms are; a row's result does not depend on its neighbours."""
    x, weight = random(rows, in_size), packed(out_size, in_size, bits, group, hadamard, float_inputs=True)
    if bf16:
        x = x.bfloat16()
    got, want = each.packed_linear(x, weight), quantised.packed_linear(x, weight)
    torch.testing.assert_close(got, want, **({"rtol": 8e-3, "atol": 1e-3} if bf16 else {"rtol": 2e-6, "atol": 4e-6}))
    assert torch.equal(got, torch.cat([each.packed_linear(row[None], weight) for row in x]))


def test_a_float_activation_that_is_no_number_shows_in_its_row_alone(each):
    x, weight = random(14, 96), packed(32, 96, 4, 32, float_inputs=True)
    x[1, 40] = float("nan")
    got = each.packed_linear(x, weight)
    assert got[1].isnan().all()
    assert got[[0, *range(2, 14)]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("hadamard", [False, True])
def test_fused_layers_with_float_activations_equal_their_twins(each, rows, hadamard):
    x, norm = random(rows, 70), random(70, seed=2) * 0.1 + 1
    near = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums, three layers of them
    qkv = packed((4 + 2 * 2) * 32, 70, 4, 32, hadamard, float_inputs=True)
    arguments = (x, norm, 1e-5, qkv, turns(rows, 32), 4, 2)
    torch.testing.assert_close(each.packed_qkv(*arguments), quantised.packed_qkv(*arguments), **near)
    gate_up = packed(2 * 80, 70, 4, 32, hadamard, float_inputs=True)
    down, square = packed(70, 80, 8, 64, hadamard, 2, True), packed(70, 70, 4, 32, hadamard, 3, True)
    for name, arguments in (
        ("packed_feed_forward", (x, norm, 1e-5, gate_up, down)),
        ("packed_swiglu", (x, gate_up, down)),
        ("packed_linear_add", (x, square, random(rows, 70, seed=3))),
    ):
        torch.testing.assert_close(getattr(each, name)(*arguments), getattr(quantised, name)(*arguments), **near)


def test_rows_may_lie_apart(each):
    x, weight = random(5, 128), packed(48, 64, 4, 64)
    assert torch.equal(each.packed_linear(x[:, :64], weight), each.packed_linear(x[:, :64].contiguous(), weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_no_number_shows(each, bad, rows):
    x, weight = random(rows, 96), packed(32, 96, 4, 32)
    x[1, 40] = bad
    got = each.packed_linear(x, weight)
    assert got[1].isnan().all()
    assert got[0].isfinite().all()
    assert quantised.packed_linear(x, weight)[1].isnan().all()


def test_zeros_stay_zero(each):
    assert not each.packed_linear(torch.zeros(3, 70), packed(20, 70, 8, 32)).any()
    assert each.packed_linear(torch.zeros(0, 70), packed(20, 70, 8, 32)).shape == (0, 20)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_qkv_equals_its_twin(each, rows, dtype, bits):
    x, norm, weight = random(rows, 70).to(dtype), (random(70, seed=2) * 0.1 + 1).to(dtype), packed((4 + 2 * 2) * 32, 70, bits, 32)
    got = each.packed_qkv(x, norm, 1e-5, weight, turns(rows, 32), 4, 2)
    want = quantised.packed_qkv(x, norm, 1e-5, weight, turns(rows, 32), 4, 2)
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, **(STEP if dtype == torch.float32 else BF16))


@pytest.mark.parametrize("rows", [1, 8, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_and_experts_equal_their_twins(each, rows, dtype):
    x, norm = random(rows, 70).to(dtype), torch.ones(70, dtype=dtype)
    gate_up, down, addend = packed(2 * 80, 70, 4, 32), packed(70, 80, 8, 64, seed=2), random(rows, 70, seed=3).to(dtype)
    bound = STEP if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}  # three layers of roundings
    got, want = each.packed_feed_forward(x, norm, 1e-5, gate_up, down), quantised.packed_feed_forward(x, norm, 1e-5, gate_up, down)
    torch.testing.assert_close(got, want, **bound)
    torch.testing.assert_close(each.packed_swiglu(x, gate_up, down), quantised.packed_swiglu(x, gate_up, down), **bound)
    square = packed(70, 70, 4, 32)
    torch.testing.assert_close(
        each.packed_linear_add(x, square, addend),
        quantised.packed_linear_add(x, square, addend),
        **(EXACT if dtype == torch.float32 else BF16),
    )


@pytest.mark.parametrize("inner", [8, 24, 40])
def test_experts_of_any_width_equal_their_twin(each, inner):
    """The fused kernel takes multiples of 16; the others go by two products."""
    x, gate_up, down = random(5, 64), packed(2 * inner, 64, 4, 32), packed(64, inner, 4, 32)
    torch.testing.assert_close(each.packed_swiglu(x, gate_up, down), quantised.packed_swiglu(x, gate_up, down), **STEP)


@odd
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    size=st.sampled_from([16, 48, 64]),
    bf16=st.booleans(),
    data=st.data(),
)
def test_attention_over_pages_equals_its_twin(each, lengths, kv_heads, group, size, bf16, data):
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    pages = data.draw(st.permutations(range(4 * -(-60 // page_size))))
    table = torch.tensor(pages[: len(lengths) * -(-60 // page_size)]).view(len(lengths), -1)
    dtype = torch.bfloat16 if bf16 else torch.float32
    keys, values = (random(len(pages) * page_size, kv_heads, size, seed=s).to(dtype) for s in (1, 2))
    q = random(len(lengths), kv_heads * group, size).to(dtype)
    arguments = (q, keys, values, table, torch.tensor(lengths), page_size)
    got, want = each.paged_attention(*arguments), quantised.paged_attention(*arguments)
    torch.testing.assert_close(got, want, **({"rtol": 1e-2, "atol": 1e-2} if bf16 else {"rtol": 1e-5, "atol": 1e-5}))


@odd
@given(rows=st.integers(1, 70), out_size=st.integers(1, 140), in_size=st.integers(1, 200), bf16=st.booleans())
def test_a_bfloat16_product_equals_a_plain_one(each, rows, out_size, in_size, bf16):
    x, weight = random(rows, in_size), random(out_size, in_size, seed=1).bfloat16()
    if bf16:
        x = x.bfloat16()
    want = x.double() @ weight.double().T
    got = each.bf16_linear(x, weight).double()
    torch.testing.assert_close(got, want, atol=1e-5 * in_size + (4e-3 * in_size**0.5 if bf16 else 0), rtol=8e-3 if bf16 else 1e-5)


def test_float32_activations_are_not_rounded(each):
    """Parts of 8 bits, each met by the weight: as near the float64 product as float32 sums of 1,000 terms are, where one bfloat16 part
    would be off by 2 ** -9 of every term. Magnitudes from 1e-20 to 1e20 lose nothing either. 1,100 rows are more than one pass takes."""
    weight = random(48, 1000, seed=1).bfloat16()
    for rows in (1, 8, 33, 1100):
        x = random(rows, 1000) * 10.0 ** (torch.arange(rows)[:, None] % 41 - 20)
        want = x.double() @ weight.double().T
        scale = x.double().abs() @ weight.double().abs().T  # what roundings are relative to
        assert ((each.bf16_linear(x, weight).double() - want).abs() / scale).max() < 2e-6


def test_rows_with_a_stride_and_what_is_no_number(each):
    x, weight = random(40, 100), random(50, 100, seed=1).bfloat16()
    x[3, 5], x[20, 7], x[33, 99] = float("nan"), float("inf"), float("-inf")
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 20, 33]] = True
    got = each.bf16_linear(x[:, :96], weight[:, :96].contiguous())
    assert not torch.isfinite(got[[3, 20]]).any()
    torch.testing.assert_close(got[~bad], x[~bad, :96] @ weight[:, :96].float().T, rtol=1e-4, atol=1e-4)
    got = each.bf16_linear(x.bfloat16(), weight)
    assert not torch.isfinite(got[bad]).any()
    assert torch.isfinite(got[~bad]).all()


@odd
@given(rows=st.integers(1, 40), bias=st.booleans(), bf16=st.booleans())
def test_linear_and_experts_with_a_bfloat16_weight(each, rows, bias, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, weight, addend = random(rows, 64).to(dtype), random(70, 64, seed=1).bfloat16(), random(70, seed=2).to(dtype) if bias else None
    bound = {"rtol": 2e-2, "atol": 1e-1} if bf16 else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(each.linear(x, weight, addend), reference.linear(x, weight, addend), **bound)
    routing = reference.route(x, random(4, 64, seed=3), torch.zeros(4), 2, 1e-12)
    gate_up, down = (random(4, 96, 64, seed=4) / 8).bfloat16(), (random(4, 64, 48, seed=5) / 8).bfloat16()
    torch.testing.assert_close(each.experts(x, routing, gate_up, down), reference.experts(x, routing, gate_up, down), **bound)


def test_a_gradient_goes_through_torch(each):
    x, weight = random(3, 64).requires_grad_(), random(5, 64, seed=1).bfloat16()
    each.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each.linear(random(64, 4).t(), weight), random(64, 4).t() @ weight.float().T, rtol=1e-5, atol=1e-4)


@odd
@given(rows=st.integers(1, 40), width=st.integers(1, 100), bf16=st.booleans())
def test_a_norm_equals_its_twin(each, rows, width, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, weight = random(rows, width).to(dtype) * 3, random(width, seed=1).to(dtype)
    # sums in another order; a bfloat16 may round the other way
    bound = {"rtol": 2e-2, "atol": 1e-2} if bf16 else {"rtol": 2e-6, "atol": 2e-6}
    with torch.inference_mode():
        got = each.rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-5), **bound)
        torch.testing.assert_close(each.rms_norm(x.repeat(1, 2)[:, :width], weight, 1e-5), got, rtol=0, atol=0)


@odd
@given(rows=st.integers(1, 40), heads=st.integers(1, 5), sixteens=st.integers(1, 8), more=st.integers(0, 2), bf16=st.booleans())
def test_turning_equals_its_twin(each, rows, heads, sixteens, more, bf16):
    """Whatever stands behind the heads that turn, as the values do behind queries and keys."""
    x = random(rows, heads + more, 16 * sixteens).to(torch.bfloat16 if bf16 else torch.float32)[:, :heads]
    bound = {"rtol": 1e-2, "atol": 1e-2} if bf16 else {"rtol": 1e-6, "atol": 1e-6}  # the sum of two products, in another order
    with torch.inference_mode():
        got = each.rotate_pairs(x, turns(rows, 16 * sixteens))
    torch.testing.assert_close(got, reference.rotate_pairs(x, turns(rows, 16 * sixteens)), **bound)
    assert got.is_contiguous()


@odd
@given(rows=st.integers(1, 40), width=st.integers(1, 200), large=st.booleans(), bf16=st.booleans())
def test_swiglu_equals_its_twin(each, rows, width, large, bf16):
    x = (random(rows, 2 * width) * (200 if large else 3)).to(torch.bfloat16 if bf16 else torch.float32)
    bound = {"rtol": 2e-2, "atol": 1e-6} if bf16 else {"rtol": 2e-6, "atol": 1e-6}  # its exponential is right to 2e-7
    with torch.inference_mode():
        torch.testing.assert_close(each.swiglu(x), reference.swiglu(x), **bound)
        assert each.swiglu(torch.full((1, 32), torch.nan)).isnan().all()


@pytest.mark.parametrize("name", ["rms_norm", "rotate_pairs", "swiglu"])
def test_who_wants_a_gradient_gets_one(each, name):
    x = random(3, 2, 32).requires_grad_()
    calls = {
        "rms_norm": lambda: each.rms_norm(x.flatten(1), torch.ones(64), 1e-5),
        "rotate_pairs": lambda: each.rotate_pairs(x, turns(3, 32)),
        "swiglu": lambda: each.swiglu(x.flatten(1)),
    }
    calls[name]().square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_operators_keep_torchs_rules(kernels):
    x, norm, weight, down = random(3, 64), torch.ones(64), packed(96, 64, 4, 32), packed(64, 48, 4, 0)
    ops, isa = torch.ops.ernie45, kernels.isa
    calls = [
        (ops.linear, (x, norm, 1e-5, weight.values, weight.scales, 4, 96, None, isa)),
        (ops.linear, (x, None, 0.0, weight.values, weight.scales, 4, 96, random(3, 96), isa)),
        (ops.qkv, (x, norm, 1e-5, weight.values, weight.scales, 4, torch.view_as_real(turns(3, 16)), 2, 2, 16, isa)),
        (ops.feed_forward, (x, norm, 1e-5, weight.values, weight.scales, 4, down.values, down.scales, 4, 48, isa)),
        (ops.rms_norm, (x, norm, 1e-5, isa)),
        (ops.rotate, (x, torch.view_as_real(turns(3, 32)), isa)),
        (ops.swiglu, (x, isa)),
        (ops.bf16_linear, (x, random(5, 64).bfloat16(), isa)),
        (ops.paged_attention, (random(1, 2, 16), random(8, 1, 16), random(8, 1, 16), torch.tensor([[1]]), torch.tensor([3]), 4, isa)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
