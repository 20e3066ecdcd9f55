"""Preference losses against their formulas in float64, and the shared prompt against separate rows."""

import math
from contextlib import nullcontext

import pytest
import torch

from ernie45.errors import ConfigError, DataError
from ernie45.nn.attention import PackedCausal
from ernie45.nn.lora import LoraConfig, adapt, without_adapters
from ernie45.tokens.template import IGNORED
from ernie45.train.comparison import ComparisonStep
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PackedRows, PairExample, PairJudge, Reference, pack_pairs, pair_log_probs
from ernie45.train.preference_losses import Pairs, PreferenceConfig, preference_loss
from tests.train.conftest import make_decoder


def make_pair(seed, prompt=6, chosen=5, rejected=8):
    """Random ids; the branches open with the last token of the prompt, which is not learned."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 512, (prompt + chosen + rejected,), generator=g).tolist()
    prefix, last = ids[: prompt - 1], ids[prompt - 1]
    c, r = (last, *ids[prompt : prompt + chosen]), (last, *ids[prompt + chosen :])
    return PairExample(tuple(prefix), c, r, (IGNORED, *c[1:]), (IGNORED, *r[1:]), gap=1.0 + seed)


PAIRS = [make_pair(0), make_pair(1, prompt=1), make_pair(2, chosen=1, rejected=1), make_pair(3, prompt=12)]
# log-probabilities of up to 8 tokens around -6 each in float32
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def separate(decoder, pair):
    """Log-probabilities of both answers, each in a row of its own, by the plain formula."""
    sums = []
    for branch in (pair.chosen, pair.rejected):
        ids = torch.tensor([*pair.prefix, *branch])
        logits = decoder.logits(decoder(decoder.embed(ids), torch.arange(len(ids)), PackedCausal([len(ids)])))
        logps = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        sums.append(logps[len(pair.prefix) :].sum())
    return sums


@pytest.mark.parametrize("experts", [False, True])
def test_a_shared_prompt_equals_separate_rows(experts):
    decoder = make_decoder(experts=experts)
    c, r = pair_log_probs(decoder, pack_pairs(PAIRS))
    expected = [separate(decoder, pair) for pair in PAIRS]
    torch.testing.assert_close(c, torch.stack([e[0] for e in expected]), **CLOSE)
    torch.testing.assert_close(r, torch.stack([e[1] for e in expected]), **CLOSE)
    (c - 2 * r).sum().backward()
    grads = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    sum(e[0] - 2 * e[1] for e in expected).backward()
    for name, parameter in decoder.named_parameters():
        if name in grads:
            # gradients up to 100 summed over 50 rows in another order
            torch.testing.assert_close(grads[name], parameter.grad, atol=2e-4, rtol=1e-4)


def logsig(x):
    return -math.log1p(math.exp(-x))


def sig(x):
    return 1 / (1 + math.exp(-x))


# Each formula once more, in plain numbers: c, r, c0, r0 of one pair, tokens of its answers, and the batch's mean drifts.
BETA = 0.3
FORMULAS = {
    "sigmoid": lambda d, w, z, c, r, n, m, dw, dl: -logsig(BETA * d),
    "hinge": lambda d, w, z, c, r, n, m, dw, dl: max(0.0, 1 - BETA * d),
    "ipo": lambda d, w, z, c, r, n, m, dw, dl: (w / n - z / m - 1 / (2 * BETA)) ** 2,
    "simpo": lambda d, w, z, c, r, n, m, dw, dl: -logsig(BETA * (c / n - r / m - 0.5 / BETA)),
    "dpop": lambda d, w, z, c, r, n, m, dw, dl: -logsig(BETA * d) + 50 * max(0.0, -w),
    "kto-pair": lambda d, w, z, c, r, n, m, dw, dl: 1 - sig(BETA * (w - max(0, dl))) + 1 - sig(BETA * (max(0, dw) - z)),
    "sppo": lambda d, w, z, c, r, n, m, dw, dl: (w - 1 / (2 * BETA)) ** 2 + (z + 1 / (2 * BETA)) ** 2,
    "nca": lambda d, w, z, c, r, n, m, dw, dl: -logsig(BETA * w) - 0.5 * logsig(-BETA * w) - 0.5 * logsig(-BETA * z),
    "orpo": lambda d, w, z, c, r, n, m, dw, dl: (
        -BETA * logsig(c / n - r / m - math.log(1 - math.exp(c / n)) + math.log(1 - math.exp(r / m)))
    ),
}


def some_pairs():
    g = torch.Generator().manual_seed(5)
    c, r, c0, r0 = (-torch.rand(6, generator=g) * 20 - 1 for _ in range(4))
    return Pairs(c, r, c0, r0, torch.tensor([3.0, 1, 7, 2, 9, 4]), torch.tensor([5.0, 2, 2, 8, 1, 3]), torch.arange(1.0, 7.0))


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_its_formula(name):
    p = some_pairs()
    dw, dl = (p.c - p.c0).mean().item(), (p.r - p.r0).mean().item()
    found = preference_loss(p, PreferenceConfig(loss=name, beta=BETA))
    for n in range(6):
        c, r, c0, r0 = (t[n].item() for t in (p.c, p.r, p.c0, p.r0))
        expected = FORMULAS[name](c - c0 - r + r0, c - c0, r - r0, c, r, p.c_tokens[n].item(), p.r_tokens[n].item(), dw, dl)
        assert found[n].item() == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_smoothing_and_offset():
    p = some_pairs()
    d = p.delta[2].item()
    smooth = preference_loss(p, PreferenceConfig(beta=BETA, smoothing=0.2))[2].item()
    assert smooth == pytest.approx(-0.8 * logsig(BETA * d) - 0.2 * logsig(-BETA * d), rel=1e-5)
    offset = preference_loss(p, PreferenceConfig(beta=BETA, offset=0.7))[2].item()
    assert offset == pytest.approx(-logsig(BETA * (d - 0.7 / BETA * math.log(3 + 1e-6))), rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_prefers_the_chosen_answer_after_some_steps(name):
    decoder, frozen = make_decoder(), make_decoder().requires_grad_(False)
    config = PreferenceConfig(loss=name, beta=BETA, answer=1.0 if name == "orpo" else 0.0)
    reference = Reference(frozen, nullcontext) if config.needs_reference else None
    learner = ComparisonStep(PairJudge(decoder, config, reference), Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 32))
    reports = [learner([pack_pairs(PAIRS)], n, 3e-3) for n in range(8)]
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].margin > reports[0].margin
    assert reports[-1].accuracy == 1.0


def test_at_the_start_policy_and_reference_agree():
    decoder = make_decoder()
    adapt(decoder.requires_grad_(False).layers, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    reference = Reference(decoder, lambda: without_adapters(decoder))
    learner = ComparisonStep(PairJudge(decoder, PreferenceConfig(), reference), Optimiser(decoder, OptimiserConfig(), 32))
    first = learner([pack_pairs(PAIRS)], 0, 1e-3)
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.margin == pytest.approx(0, abs=1e-5)
    assert learner([pack_pairs(PAIRS)], 1, 1e-3).loss < first.loss


def test_how_a_step_is_cut_changes_nothing():
    def losses(batches):
        decoder, frozen = make_decoder(), make_decoder().requires_grad_(False)
        learner = ComparisonStep(
            PairJudge(decoder, PreferenceConfig(), Reference(frozen, nullcontext)), Optimiser(decoder, OptimiserConfig(), 32)
        )
        return [(report.loss, report.norm) for report in (learner(batches, n, 1e-3) for n in range(3))]

    whole, cut = losses([pack_pairs(PAIRS)]), losses([pack_pairs(PAIRS[:1]), pack_pairs(PAIRS[1:])])
    assert [n for row in cut for n in row] == pytest.approx([n for row in whole for n in row], rel=1e-4)


def test_pairs_are_packed_within_the_limit_each_once():
    data = PackedRows(PAIRS * 3, 45, 0, pack_pairs)
    assert sorted(n for pack in data.packs(0) for n in pack) == list(range(12))
    assert all(data.batch(n).num_tokens <= 45 for n in range(len(data.packs(0)) + 3))
    with pytest.raises(DataError, match="not one answer"):
        PackedRows([], 45, 0, pack_pairs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0.0},
        {"smoothing": 0.5},
        {"gamma": -1.0},
        {"loss": "ipo", "offset": 1.0},
        {"loss": "hinge", "smoothing": 0.1},
        {"margin": 1.0},
        {"loss": "reward", "undesirable": 2.0},
        {"loss": "kto", "answer": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"preference\."):
        PreferenceConfig(**wrong)
