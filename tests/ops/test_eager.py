"""Every fast function against its plain twin, and against a float64 twin where the order of operations matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops import eager, reference
from ernie45.ops.reference import Routing

# float32 sums of up to a few hundred terms in another order differ by a few units in the last place of values around 10
F32 = {"atol": 2e-5, "rtol": 2e-5}
# one bfloat16 step is 2 ** -8; two roundings may fall on different sides
BF16 = {"atol": 3e-2, "rtol": 2e-2}


def _rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _bound(dtype):
    return F32 if dtype == torch.float32 else BF16


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), inner=st.integers(1, 70), outer=st.integers(1, 70), bias=st.booleans(), bf16=st.booleans())
def test_linear_equals_plain_matrix_product(rows, inner, outer, bias, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, w, b = _rand(rows, inner, dtype=dtype), _rand(outer, inner, seed=1, dtype=dtype), _rand(outer, seed=2, dtype=dtype) if bias else None
    want = x.double() @ w.double().T + (0 if b is None else b.double())
    got = eager.linear(x, w, b)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=_bound(dtype)["atol"] * inner**0.5, rtol=_bound(dtype)["rtol"])


@pytest.mark.parametrize("outer", [5, 300])  # a block of 2 ** 18 elements holds 262 rows of 1,000
def test_linear_widens_a_bfloat16_weight_exactly(outer):
    x, w, b = _rand(9, 1000), _rand(outer, 1000, seed=1).bfloat16(), _rand(outer, seed=2)
    for bias in (None, b):
        got = eager.linear(x, w, bias)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, reference.linear(x, w.float(), bias), atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_rms_norm_and_swiglu(dtype, rows):
    x, w = _rand(rows, 96, dtype=dtype) * 3, _rand(96, seed=1, dtype=dtype)
    torch.testing.assert_close(eager.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5), **_bound(dtype))
    torch.testing.assert_close(eager.swiglu(x), reference.swiglu(x), **_bound(dtype))


def test_rms_norm_casts_before_the_weight():
    """In bfloat16 the published code rounds the normed value first; a weight with a long mantissa shows the difference."""
    x, w = _rand(64, 96, dtype=torch.bfloat16), _rand(96, seed=1, dtype=torch.bfloat16)
    x64 = x.double()
    normed = (x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5)).float().bfloat16()
    assert torch.equal(eager.rms_norm(x, w, 1e-5), normed * w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 1, 1000, 131_071])
def test_rotation_equals_a_float64_turn(dtype, position):
    x = _rand(3, 4, 16, dtype=dtype)
    angle = position * torch.arange(8).double().neg().div(8).mul(torch.tensor(500_000.0).log()).exp().float()
    turns = torch.polar(torch.ones(3, 8), angle.expand(3, 8).contiguous())
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    want = torch.view_as_real(pairs * turns[:, None].to(torch.complex128)).flatten(-2)
    for op in (eager.rotate_pairs, reference.rotate_pairs):
        torch.testing.assert_close(op(x, turns).double(), want, **_bound(dtype))


def test_rotation_takes_a_slice_of_fused_heads():
    fused = _rand(5, 6, 8)
    turns = torch.polar(torch.ones(5, 4), _rand(5, 4, seed=1))
    torch.testing.assert_close(eager.rotate_pairs(fused[:, :4], turns), reference.rotate_pairs(fused[:, :4], turns), **F32)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(2, 9), data=st.data())
def test_experts_equal_a_loop_over_tokens(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    x, gate_up, down = _rand(tokens, 12), _rand(experts, 20, 12, seed=1), _rand(experts, 12, 10, seed=2)
    routing = reference.route(x, _rand(experts, 12, seed=3), _rand(experts, seed=4) * 0.1, top_k, 1e-12)
    want = torch.zeros(tokens, 12, dtype=torch.float64)
    for t in range(tokens):
        for e, w in zip(routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            want[t] += w * (down[e].double() @ (torch.nn.functional.silu(gate) * up))
    for op in (eager.experts, reference.experts):
        torch.testing.assert_close(op(x, routing, gate_up, down).double(), want, atol=2e-4, rtol=1e-4)  # values up to 100


def test_experts_gradients_equal_the_plain_twin():
    inputs = [_rand(9, 12), _rand(4, 20, 12, seed=1), _rand(4, 12, 10, seed=2)]
    routing = reference.route(inputs[0], _rand(4, 12, seed=3), torch.zeros(4), 2, 1e-12)
    grads = []
    for op in (eager.experts, reference.experts):
        leaves = [t.clone().requires_grad_() for t in inputs]
        weights = routing.weights.clone().requires_grad_()
        op(leaves[0], Routing(routing.experts, weights), leaves[1], leaves[2]).square().sum().backward()
        grads.append([t.grad for t in (*leaves, weights)])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-2, rtol=1e-4)  # gradients reach 1e4


def test_selection_bias_changes_the_choice_and_never_the_weights():
    x, w = _rand(50, 16), _rand(6, 16, seed=1)
    plain = reference.route(x, w, torch.zeros(6), 2, 1e-12)
    shifted = reference.route(x, w, torch.full((6,), 0.7), 2, 1e-12)
    assert torch.equal(plain.experts, shifted.experts), "a constant shift of the bias changes nothing"
    assert torch.equal(plain.weights, shifted.weights)
    biased = reference.route(x, w, torch.tensor([0.0, 0, 0, 0, 0, 1.0]), 2, 1e-12)
    assert (biased.experts == 5).any(-1).all(), "a bias of one outweighs every softmax score"
    assert not torch.equal(plain.experts, biased.experts)
    scores = (x.double() @ w.double().T).softmax(-1).gather(1, biased.experts)
    torch.testing.assert_close(biased.weights.double(), scores / scores.sum(-1, keepdim=True), **F32)
    torch.testing.assert_close(biased.weights.sum(-1), torch.ones(50), **F32)


def test_routing_stays_float32_when_the_model_is_bfloat16():
    x, w = _rand(20, 16, dtype=torch.bfloat16), _rand(6, 16, seed=1)
    routing = reference.route(x, w, torch.zeros(6), 3, 1e-12)
    assert routing.weights.dtype == torch.float32
    want = (x.double() @ w.double().T).softmax(-1)
    assert torch.equal(routing.experts, want.topk(3).indices)


@settings(max_examples=40, deadline=None)
@given(asked=st.integers(1, 12), before=st.integers(0, 12), kv_heads=st.integers(1, 3), group=st.integers(1, 3), bf16=st.booleans())
def test_attention_equals_the_plain_twin(asked, before, kv_heads, group, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    q = _rand(asked, kv_heads * group, 8, dtype=dtype)
    k, v = (_rand(asked + before, kv_heads, 8, seed=s, dtype=dtype) for s in (1, 2))
    torch.testing.assert_close(eager.causal_attention(q, k, v), reference.causal_attention(q, k, v), **_bound(dtype))


def test_attention_reference_is_causal_and_groups_heads_in_blocks():
    q, k, v = _rand(4, 4, 8), _rand(4, 2, 8, seed=1), _rand(4, 2, 8, seed=2)
    out = reference.causal_attention(q, k, v)
    torch.testing.assert_close(
        out[0], v[0].repeat_interleave(2, 0), **F32
    )  # the first token sees itself alone, heads 0 and 1 share key head 0
    changed = reference.causal_attention(q, torch.cat((k[:3], k[3:] * 9)), torch.cat((v[:3], v[3:] * 9)))
    assert torch.equal(out[:3], changed[:3]), "a later key must not be seen"
    assert not torch.equal(out[3], changed[3])
