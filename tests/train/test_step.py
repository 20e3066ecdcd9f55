"""The step: packing, accumulation, recompute and router losses change what they should and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ernie45.errors import ConfigError
from ernie45.models.released import tiny
from ernie45.nn.attention import PackedCausal
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, pack, plan_packs
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder, make_examples

# float32 sums in another order; gradients of size 1e-3 to 1
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


class Keep(Optimiser):
    """An optimiser that keeps the gradients of its last step and moves nothing."""

    def step(self, rate, norm):
        self.grads = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        self.drop_gradients()


def gradients(decoder, batches, losses=None, recompute=False):
    optimiser = Keep(decoder, OptimiserConfig(), 16)
    step = Step(decoder, optimiser, losses or LossConfig(), recompute=recompute)
    report = step(batches, 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads


def assert_same(a, b, **how):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(how or CLOSE), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("experts", [False, True])
def test_the_loss_is_the_mean_over_learned_labels_of_separate_documents(experts):
    decoder, examples = make_decoder(experts=experts), make_examples((7, 12, 5))
    report, grads = gradients(decoder, [pack(examples)])
    if not experts:  # the router computes in float32 whatever comes
        decoder.double()
    losses = []
    for example in examples:
        ids = torch.tensor(example.ids)
        logits = decoder.logits(decoder(decoder.embed(ids), torch.arange(len(ids)), PackedCausal([len(ids)])))
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="none"))
    loss = torch.cat(losses).sum() / sum(example.learned for example in examples)
    assert report.loss == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    assert_same(grads, {name: p.grad.float() for name, p in decoder.named_parameters() if p.grad is not None}, atol=1e-5, rtol=1e-4)


def test_accumulation_changes_nothing_however_uneven_the_parts():
    decoder, examples = make_decoder(experts=True), make_examples((7, 30, 5, 3))
    whole, whole_grads = gradients(decoder, [pack(examples)])
    parts, part_grads = gradients(decoder, [pack(examples[:1]), pack(examples[1:3]), pack(examples[3:])])
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert (parts.learned, parts.tokens) == (whole.learned, whole.tokens)
    assert parts.load == whole.load
    assert_same(whole_grads, part_grads)


@pytest.mark.parametrize("mtp", [0, 1])
def test_recompute_changes_nothing(mtp):
    config = replace(tiny(experts=True), num_mtp=mtp)
    decoder, losses = make_decoder(config), LossConfig(balance=0.1, z=0.1, orthogonal=0.1)
    plain, grads = gradients(decoder, [make_batch()], losses)
    again, grads_again = gradients(decoder, [make_batch()], losses, recompute=True)
    assert again.loss == plain.loss
    assert again.load == plain.load
    assert (again.mtp_loss is None) == (mtp == 0)
    assert_same(grads, grads_again, atol=0, rtol=0)


def test_router_losses_add_gradient_and_leave_the_loss():
    decoder = make_decoder(experts=True)
    plain, grads = gradients(decoder, [make_batch()])
    with_losses, more = gradients(decoder, [make_batch()], LossConfig(balance=0.5, z=0.5, orthogonal=0.5))
    assert with_losses.loss == plain.loss
    assert with_losses.balance_loss > 1
    assert with_losses.orthogonal_loss > 0
    assert with_losses.z_loss > 0
    assert plain.balance_loss is plain.z_loss is plain.orthogonal_loss is None
    assert not torch.allclose(grads["layers.1.ffn.router.weight"], more["layers.1.ffn.router.weight"])


def test_the_mtp_loss_is_the_plain_formula():
    decoder, examples = make_decoder(replace(tiny(), num_mtp=1)), make_examples((6, 9))
    report, grads = gradients(decoder, [pack(examples)], LossConfig(mtp=0.3))
    decoder.double()
    main, ahead = [], []
    for example in examples:
        ids = torch.tensor(example.ids)
        n = len(ids)
        h = decoder(decoder.embed(ids), torch.arange(n), PackedCausal([n]))
        m = decoder.predict_after_next(ids[1:], h[:-1], torch.arange(1, n), PackedCausal([n - 1]))
        labels = torch.tensor(example.labels)
        main.append(F.cross_entropy(decoder.logits(h[:-1]), labels[1:], ignore_index=IGNORED, reduction="none")[labels[1:] != IGNORED])
        ahead.append(F.cross_entropy(decoder.logits(m[:-1]), labels[2:], ignore_index=IGNORED, reduction="none")[labels[2:] != IGNORED])
    main, ahead = torch.cat(main).mean(), torch.cat(ahead).mean()
    assert report.loss == pytest.approx(main.item(), abs=1e-5)
    assert report.mtp_loss == pytest.approx(ahead.item(), abs=1e-5)
    (main + 0.3 * ahead).backward()
    expected = {name: p.grad.float() for name, p in decoder.named_parameters() if p.grad is not None}
    assert any(name.startswith("mtp.") for name in grads)
    assert_same(grads, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_the_selection_bias_moves_once_a_step_by_the_whole_load(recompute, cut):
    decoder, examples = make_decoder(experts=True), make_examples((7, 12, 5))
    optimiser = Optimiser(decoder, OptimiserConfig(), 16)
    step = Step(decoder, optimiser, LossConfig(bias_rate=0.125), recompute=recompute)
    counts = []
    hook = step.watch.routers[0].register_forward_hook(lambda *args: counts.append(args[2].experts))
    step([pack(examples)] if not cut else [pack([e]) for e in examples], 0, 1e-3)
    hook.remove()
    seen = torch.cat(counts[: 3 if cut else 1]).flatten() if not (cut and recompute) else torch.cat(counts[::2]).flatten()
    load = torch.bincount(seen, minlength=len(step.watch.routers[0].weight)).double()
    expected = 0.125 * (load.mean() - load).sign()
    assert torch.equal(step.watch.routers[0].selection_bias.double(), expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("experts", [False, True])
def test_a_model_learns_a_batch_by_heart(experts):
    decoder = make_decoder(experts=experts, std=0.05)
    optimiser = Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 16)
    step = Step(decoder, optimiser, LossConfig(bias_rate=1e-3 if experts else 0.0, balance=1e-3))
    losses = [step([make_batch()], n, 1e-2).loss for n in range(40)]
    assert losses[0] > 5.5  # ln 512 = 6.2
    assert losses[-1] < 0.05


def test_a_step_without_labels_is_refused():
    decoder = make_decoder()
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig())
    with pytest.raises(ConfigError, match="no learned label"):
        step([pack([Example((4, 5, 6), (IGNORED,) * 3)])], 0, 1e-3)


@pytest.mark.parametrize("name", ["balance", "mtp", "bias_rate"])
def test_weights_of_losses_are_checked(name):
    with pytest.raises(ConfigError, match=f"losses.{name}"):
        LossConfig(**{name: -1.0})


def test_the_report_is_one_plain_line():
    report, _ = gradients(make_decoder(experts=True), [make_batch()])
    data = report.as_json()
    assert data["tokens"] == 24
    assert "mtp_loss" not in data
    assert len(data["load"]) >= 2
    assert data["tokens_per_second"] > 0


def test_packing_shifts_labels_inside_documents():
    batch = pack([Example((5, 6, 7), (IGNORED, 6, 9)), Example((8, 9), (8, 9))])
    assert batch.labels_T.tolist() == [6, 9, IGNORED, 9, IGNORED]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.doc_ends == (3, 5)
    ahead = batch.after_next()
    assert ahead.next_tokens_T.tolist() == [6, 7, 0, 9, 0]
    assert ahead.labels_T.tolist() == [9, IGNORED, IGNORED, IGNORED, IGNORED]


def test_plans_hold_every_document_once_within_the_limit():
    lengths = [5, 9, 3, 10, 1, 1, 6]
    packs = plan_packs(lengths, 10)
    assert sorted(n for one in packs for n in one) == list(range(7))
    assert all(sum(lengths[n] for n in one) <= 10 for one in packs)
    assert len(packs) == 4
