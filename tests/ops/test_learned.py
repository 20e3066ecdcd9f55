"""Row work whose gradient is written by hand, against autograd through the plain formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops import eager, reference
from tests.ops.test_fp8 import random

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of values around 1: a few units in the last place


def gradients(function, tensors, pull):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    out.backward(pull.to(out.dtype))
    return [out.detach(), *(tensor.grad for tensor in tensors)]


def compare(fast, plain, tensors, pull, dtype):
    tensors = [tensor.to(dtype) for tensor in tensors]
    found = gradients(fast, tensors, pull.to(dtype))
    expected = gradients(plain, [tensor.double() for tensor in tensors], pull.to(dtype).double())
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * scale)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 70), bf16=st.booleans(), seed=st.integers(0, 9))
def test_swiglu(rows, width, bf16, seed):
    gate_up, pull = random(rows, 2 * width, seed=seed) * 2, random(rows, width, seed=seed + 1)
    compare(eager.swiglu, reference.swiglu, [gate_up], pull, torch.bfloat16 if bf16 else torch.float32)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 70), bf16=st.booleans(), seed=st.integers(0, 9))
def test_rms_norm(rows, width, bf16, seed):
    x, weight, pull = random(rows, width, seed=seed) * 3, 1 + 0.3 * random(width, seed=seed + 1), random(rows, width, seed=seed + 2)
    dtype = torch.bfloat16 if bf16 else torch.float32
    compare(lambda x, w: eager.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), [x, weight], pull, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_without_a_gradient_and_only_the_input_is_kept(dtype):
    x, weight = random(9, 48).to(dtype).requires_grad_(), random(48, seed=1).to(dtype)
    for made, plain in ((lambda: eager.swiglu(x), lambda: eager.swiglu(x.detach())), (lambda: eager.rms_norm(x, weight, 1e-5),) * 2):
        out = made()
        with torch.no_grad():
            assert torch.equal(out, plain())
        kept = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors} - {weight.data_ptr()}
        assert kept == {x.data_ptr()}


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 300), bf16=st.booleans(), sharp=st.sampled_from([1, 6]), seed=st.integers(0, 9))
def test_attention_of_a_document(tokens, bf16, sharp, seed):
    """Sharp weights come from scores of up to 100, which bfloat16 alone rounds by a quarter."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    tensors = [random(tokens, heads, 16, seed=seed + n).to(dtype) for n, heads in enumerate((4, 2, 2))]
    tensors[0] *= sharp
    pull = random(tokens, 4, 16, seed=seed + 7).to(dtype)
    found = gradients(eager.causal_attention, tensors, pull)
    expected = gradients(reference.causal_attention, [tensor.double() for tensor in tensors], pull.double())
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        # numbers, weights and pulls are rounded once each
        bound = 0.02 if bf16 else 2e-5
        assert float((got.double() - want).norm()) <= bound * max(float(want.norm()), 1e-3)


def test_attention_keeps_no_repeated_keys():
    q, k, v = (random(40, heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2))
    out = eager.causal_attention(q, k, v)
    assert sum(tensor.nbytes for tensor in out.grad_fn.saved_tensors) == q.nbytes + k.nbytes + v.nbytes + 4 * 40 * 4
    with torch.no_grad():
        assert torch.equal(out, eager.causal_attention(q, k, v))
