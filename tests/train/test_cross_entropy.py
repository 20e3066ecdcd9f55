"""Chunked cross entropy against autograd through the plain formula in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ernie45 import ops
from ernie45.tokens.template import IGNORED
from ernie45.train.cross_entropy import summed_cross_entropy, token_log_probs

# float32 sums of up to 40 terms of size 1 in another order: 40 * 6e-8, with room
CLOSE = {"atol": 5e-6, "rtol": 5e-6}


def inputs(rows, vocab, width=6, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.4] = IGNORED
    return h, w, torch.randn(vocab, generator=g) if bias else None, labels, torch.rand(rows, generator=g)


def twin(h, w, b, labels, weights):
    """Loss and gradients by autograd in float64."""
    leaves = [t.double().requires_grad_() for t in (h, w, b) if t is not None]
    logits = F.linear(*leaves)
    nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    loss = (nll * weights.double()).sum()
    return loss, nll, torch.autograd.grad(loss, leaves) if labels.ne(IGNORED).any() else [torch.zeros_like(t) for t in leaves]


@given(rows=st.integers(1, 40), vocab=st.integers(1, 30), chunk=st.integers(1, 200), seed=st.integers(0, 99), bias=st.booleans())
def test_both_forms_equal_autograd(rows, vocab, chunk, seed, bias):
    h, w, b, labels, weights = inputs(rows, vocab, seed=seed, bias=bias)
    loss64, nll64, grads64 = twin(h, w, b, labels, weights)
    for form in ("summed", "logps"):
        leaves = [t.clone().requires_grad_() for t in (h, w, b) if t is not None]
        how = {"bias_V": leaves[2] if bias else None, "chunk_elements": chunk}
        if form == "summed":
            out = summed_cross_entropy(leaves[0], leaves[1], labels, weights, **how)
            loss, nll = out.total, out.nll_T
        else:
            nll = -token_log_probs(leaves[0], leaves[1], labels, **how)
            loss = (nll * weights).sum()
        torch.testing.assert_close(nll.double(), nll64, **CLOSE)
        torch.testing.assert_close(loss.double(), loss64, **CLOSE)
        for grad, grad64 in zip(torch.autograd.grad(loss, leaves), grads64, strict=True):
            torch.testing.assert_close(grad.double(), grad64, **CLOSE)


def test_an_upstream_factor_scales_the_gradient():
    h, w, _, labels, weights = inputs(9, 11, bias=False)
    h.requires_grad_()
    (plain,) = torch.autograd.grad(summed_cross_entropy(h, w, labels, weights).total, h)
    (scaled,) = torch.autograd.grad(3 * summed_cross_entropy(h, w, labels, weights).total, h)
    torch.testing.assert_close(scaled, 3 * plain)


def test_a_frozen_matrix_gets_no_gradient():
    h, w, _, labels, weights = inputs(9, 11, bias=False)
    h.requires_grad_()
    summed_cross_entropy(h, w, labels, weights).total.backward()
    assert h.grad is not None
    assert w.grad is None


def test_logits_of_a_million_do_not_overflow():
    h, w = torch.full((1, 1), 1e3), torch.tensor([[1e3], [-1e3]])
    out = summed_cross_entropy(h, w, torch.tensor([1]), torch.ones(1))
    assert out.total.item() == pytest.approx(2e6)


def test_bfloat16_matrices_keep_a_float32_softmax():
    h, w, _, labels, weights = inputs(30, 25, bias=False)
    h16, w16 = (t.bfloat16().requires_grad_() for t in (h, w))
    loss = summed_cross_entropy(h16, w16, labels, weights, chunk_elements=60).total
    loss64, _, grads64 = twin(h16.detach(), w16.detach(), None, labels, weights)
    # the product's result is rounded to bfloat16: 2^-9 of logits around 5
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-2)
    for grad, grad64 in zip(torch.autograd.grad(loss, (h16, w16)), grads64, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - grad64).norm() < 2e-2 * grad64.norm()


def test_the_whole_logits_never_exist(monkeypatch):
    largest = []
    real = ops.wide_product
    monkeypatch.setattr(ops, "wide_product", lambda *args: largest.append(real(*args)) or largest[-1])
    h, w, _, labels, weights = inputs(40, 30, bias=False)
    summed_cross_entropy(h, w, labels, weights, chunk_elements=90)
    assert max(t.numel() for t in largest) <= 90
    assert sum(t.shape[0] for t in largest) == labels.ne(IGNORED).sum()
