"""The work of a step: torch's own counter sees the same products."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ernie45.models.released import tiny
from ernie45.plan.flops import Learned, Passes, causal_pairs, comparison_work, step_work
from ernie45.tokens.template import IGNORED
from ernie45.train.accounting import accounted, memory_by_kind
from ernie45.train.batch import pack
from ernie45.train.comparison import ComparisonStep
from ernie45.train.optim import MovingAverage, Optimiser, OptimiserConfig
from ernie45.train.preference import PairExample, PairJudge, Reference, pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.reward import RewardJudge, RewardModel
from ernie45.train.stages import choose_learning
from ernie45.train.step import LossConfig, Step, StepReport
from tests.sighted import VISION, noise, noise_batch, sighted_decoder
from tests.train.conftest import make_decoder, make_examples


def products(counter):
    """Operations of products with matrices of the model; those in batches are attention's."""
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op))


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_products_are_those_that_torch_counts(mtp, recompute):
    """A dense model, without the attended pairs, which torch counts by another rule (the whole square)."""
    config = replace(tiny(), num_mtp=mtp)
    decoder, batch = make_decoder(config), pack(make_examples((20, 12), unlearned=1))
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig(), recompute=recompute)
    with FlopCounterMode(display=False) as counter:
        step([batch], 0, 1e-3)
    counted = products(counter)
    rows = Learned(tokens=32, pairs=0, head_rows=batch.learned, mtp_rows=batch.after_next().learned if mtp else 0)
    # the counter does not know products that are added in place, as the head's gradient is
    counted += 2 * config.vocab_size * config.hidden_size * (rows.head_rows + rows.mtp_rows)
    # nor does torch repeat the last product of a layer, whose result backward does not need
    counted += recompute * 2 * 32 * config.num_layers * config.ffn_size * config.hidden_size
    work = step_work(config, rows)
    # norms stand among the predictor's parameters
    assert work.step + recompute * work.layers == pytest.approx(counted, rel=5e-3)


def test_chosen_experts_count_and_the_others_do_not():
    config = tiny(experts=True)
    e = config.experts
    more = replace(config, experts=replace(e, num_experts=2 * e.num_experts))
    step = Learned(tokens=10, pairs=0, head_rows=0)
    routers = 3 * 2 * 10 * sum(config.is_expert_layer(n) for n in range(config.num_layers)) * e.num_experts * (config.hidden_size + 1)
    assert step_work(more, step).step - step_work(config, step).step == routers


def test_attention_counts_pairs_that_see_each_other():
    config = tiny()
    assert causal_pairs([3, 1]) == 3 * 4 / 2 + 1
    one, two = (step_work(config, Learned(tokens=4, pairs=pairs, head_rows=0)) for pairs in (causal_pairs([4]), causal_pairs([2, 2])))
    assert one.step - two.step == 3 * 4 * config.query_size * config.num_layers * 4
    assert one.layers - two.layers == 4 * config.query_size * config.num_layers * 4


@pytest.mark.parametrize("stage", ["joint", "vision", "sight"])
def test_work_of_a_model_that_sees_is_what_torch_counts(stage):
    """Tower, resampler, both banks of experts and what the language model passes on, in each stage; without the attended pairs."""
    decoder = sighted_decoder()
    choose_learning(decoder, stage)
    batch = noise_batch((5, noise(8, 8), 7, 8, 9), (4, 6, 3, 11, 5))
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())
    with FlopCounterMode(display=False) as counter:
        step([batch], 0, 1e-3)
    counted = products(counter)
    rows = Learned(
        tokens=batch.num_tokens,
        pairs=0,
        head_rows=batch.learned,
        vision_tokens=batch.seen.num_vision,
        patches=len(batch.seen.patches_SC),
    )
    if stage == "joint":  # the counter does not know products that are added in place, as the head's gradient is
        counted += 2 * decoder.config.vocab_size * decoder.config.hidden_size * batch.learned
    passes = Passes.of(name for name, p in decoder.named_parameters() if p.requires_grad)
    # norms and biases stand among the parameters; the first matrix passes no gradient to pixels; markers count as tokens of pictures
    assert step_work(decoder.config, rows, VISION, passes).step == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("compares", ["policy", "with reference", "rewards"])
def test_work_of_comparisons_is_what_torch_counts(compares):
    """Of DPO with the reference's pass, of a loss without one, and of a reward model, which has no head over words."""
    decoder, other, config = make_decoder(), make_decoder(), tiny()
    pairs = pack_pairs([PairExample((4, 5), (6, 7, 8), (6, 9, 9, 10), (IGNORED, 7, 8), (IGNORED, 9, 9, 10), 1.0) for _ in range(3)])
    if compares == "rewards":
        model = RewardModel(decoder).initialise(torch.Generator().manual_seed(0))
        judge, learns = RewardJudge(model, PreferenceConfig(loss="reward")), model
    else:
        reference = Reference(other.requires_grad_(False), nullcontext) if compares == "with reference" else None
        judge, learns = PairJudge(decoder, PreferenceConfig(loss="sigmoid" if reference else "simpo"), reference), decoder
    work = partial(comparison_work, config, None, Passes(), compares)
    step = ComparisonStep(judge, Optimiser(learns, OptimiserConfig(), 32), work=work)
    with FlopCounterMode(display=False) as counter:
        report = step([pairs], 0, 1e-3)
    # the head's logits are computed a second time in backward, and its gradient is added in place: one for the other
    counted = products(counter)
    attention = 4 * config.query_size * config.num_layers * pairs.pairs * (4 if compares == "with reference" else 3)
    assert report.work - attention == pytest.approx(counted, rel=0.01)


def test_adapters_leave_out_the_gradients_of_matrices():
    step = Learned(tokens=4, pairs=0, head_rows=2)
    adapters = Passes.of(["layers.0.attn.qkv.adapter_a", "layers.0.attn.qkv.adapter_b"])
    assert step_work(tiny(), step, passes=adapters).step == step_work(tiny(), step).step * 2 / 3


def test_shares_of_the_peak_are_of_all_that_was_done():
    report = StepReport(step=0, loss=1.0, rate=1.0, norm=1.0, tokens=1, learned=1, seconds=2.0, work=6e9, layer_work=2e9)
    found = accounted(report, peak=10e9, again=0.5)
    assert (found.mfu, found.hfu) == (0.3, 0.35)
    assert accounted(report, peak=None).mfu is None


def test_memory_by_kind_adds_up():
    decoder = make_decoder()
    optimiser = Optimiser(decoder, OptimiserConfig(), 16)
    Step(decoder, optimiser, LossConfig())([pack(make_examples((20, 12)))], 0, 1e-3)
    held = memory_by_kind(decoder, optimiser, MovingAverage(optimiser, 10))
    size = sum(p.numel() for p in decoder.parameters()) * 4
    assert held["weights"] == held["gradients"] == held["averages"] == size
    assert held["optimiser"] == pytest.approx(2 * size, rel=1e-2)
    assert held["process"] == held["passes"] + 5 * size + held["optimiser"] - 2 * size
