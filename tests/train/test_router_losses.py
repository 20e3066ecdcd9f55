"""Router losses against the published formulas written out in float64, and the watch that measures load."""

import pytest
import torch

from ernie45.models.released import tiny
from ernie45.nn.attention import PackedCausal
from ernie45.train.router_losses import RouterWatch, load_balance_loss, moved_bias, orthogonal_loss, z_loss
from ernie45.train.step import trunk
from tests.train.conftest import make_batch, make_decoder


def test_orthogonal_loss_is_the_published_formula():
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = [[(a / a.norm()) @ (b / b.norm()) for b in weight] for a in weight]
    expected = sum((gram[i][j] - float(i == j)) ** 2 for i in range(5) for j in range(5)) / 25
    assert orthogonal_loss(weight.float()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_orthogonal_loss_of_orthogonal_experts_is_nothing():
    assert orthogonal_loss(7 * torch.eye(4, 9)).item() == pytest.approx(0, abs=1e-12)


def test_orthogonal_gradient_agrees_with_finite_differences():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    orthogonal_loss(weight).backward()
    step = 1e-2
    for place in [(0, 0), (3, 5), (2, 1)]:
        moved = torch.zeros_like(weight)
        moved[place] = step
        with torch.no_grad():
            slope = (orthogonal_loss(weight + moved) - orthogonal_loss(weight - moved)) / (2 * step)
        assert weight.grad[place].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_k_when_balanced(top_k):
    # each token prefers the next expert, all equally strongly
    logits = torch.stack([torch.arange(6.0).roll(t) for t in range(6)])
    assert load_balance_loss(logits, top_k).item() == pytest.approx(top_k, rel=1e-6)


def test_balance_loss_is_larger_when_one_expert_takes_all():
    logits = torch.zeros(10, 4)
    logits[:, 2] = 5.0
    assert load_balance_loss(logits, 1).item() > 3.9


def test_balance_and_z_loss_are_the_published_formulas():
    logits = torch.randn(11, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = (logits.exp() / logits.exp().sum(1, keepdim=True)).tolist()
    m = [sum(row[e] for row in scores) / 11 for e in range(5)]
    c = [sum(e in sorted(range(5), key=lambda i: -row[i])[:2] for row in scores) / 11 for e in range(5)]
    assert load_balance_loss(logits, 2).item() == pytest.approx(5 * sum(a * b for a, b in zip(m, c, strict=True)), rel=1e-6)
    assert z_loss(logits).item() == pytest.approx((logits.exp().sum(1).log() ** 2).mean().item(), rel=1e-6)


def test_the_bias_moves_towards_the_idle():
    moved = moved_bias(torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.tensor([9, 1, 5, 5]), 0.25)
    assert moved.tolist() == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_watch_counts_each_choice_once(recompute):
    decoder, batch = make_decoder(experts=True), make_batch()
    watch = RouterWatch(decoder, want_logits=True)
    with watch.recording() as passes:
        h = trunk(decoder, decoder.embed(batch.tokens_T), batch.positions_T, PackedCausal(list(batch.doc_ends)), recompute=recompute)
    assert len(passes) == len(watch.routers) > 0
    (h.sum() + sum(z_loss(p.logits_TE) for p in passes)).backward()
    for load in watch.take_load():
        assert load.sum() == batch.num_tokens * tiny(experts=True).experts.top_k
    assert all(load.sum() == 0 for load in watch.take_load())


def test_outside_recording_nothing_is_counted():
    decoder = make_decoder(experts=True)
    watch = RouterWatch(decoder, want_logits=False)
    decoder.prompt_logits([1, 2, 3])
    assert all(load.sum() == 0 for load in watch.take_load())
    watch.close()
    assert all(not router._forward_hooks for router in watch.routers)
