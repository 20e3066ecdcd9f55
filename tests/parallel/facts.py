"""What is compared between one process and several: the same functions run in both."""

from dataclasses import replace

import torch

from ernie45.errors import RunError
from ernie45.models.released import tiny
from ernie45.parallel.ranks import ALONE
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import pack
from ernie45.train.comparison import ComparisonStep
from ernie45.train.examples import PackedExamples
from ernie45.train.loop import RunConfig, train
from ernie45.train.noise import EmbeddingNoise
from ernie45.train.optim import MovingAverage, Optimiser, OptimiserConfig
from ernie45.train.preference import PairExample, PairJudge, pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples

LOSSES = LossConfig(balance=0.1, z=0.1, orthogonal=0.1, mtp=0.3, bias_rate=0.125)
MICRO = [(7, 30), (5,), (12, 3, 9)]
"""Documents of three micro-batches: uneven in tokens, and not to be shared evenly by two."""
DATA = PackedExamples(make_examples([5, 9, 14, 7, 22, 3, 11, 8, 6, 17, 4], seed=3), limit=24, seed=1)
OPTIMISER = OptimiserConfig(eps=1e-3)
"""A large eps: with 1e-8 the first steps of AdamW are signs, and turn rounding of a gradient near 0 into a step of its own."""


class Keep(Optimiser):
    """An optimiser that keeps the gradients of its last step and moves nothing."""

    def step(self, rate, norm):
        self.grads = {name: whole(p.grad).clone() for name, p in self.parameters.items() if p.grad is not None}
        self.drop_gradients()


def whole(tensor):
    """A sharded tensor put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def moe():
    """A tiny mixture of experts with a multi-token predictor."""
    return make_decoder(replace(tiny(experts=True), num_mtp=1))


def biases(decoder):
    return {name: p.clone() for name, p in decoder.named_parameters() if name.endswith("selection_bias")}


def language(ranks):
    """Report, gradients and moved biases of one step."""
    decoder = moe()
    optimiser = Keep(decoder, OptimiserConfig(), 16)
    step = Step(decoder, optimiser, LOSSES, noise=EmbeddingNoise(1.0, seed=7), ranks=ranks)
    batches = [pack(make_examples(lengths, seed)) for seed, lengths in enumerate(MICRO)]
    report = step([batches[n] for n in ranks.share(len(batches))], 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads, biases(decoder)


def preference(ranks):
    """Report and gradients of one step over pairs."""
    decoder = make_decoder()
    optimiser = Keep(decoder, OptimiserConfig(), 16)
    step = ComparisonStep(PairJudge(decoder, PreferenceConfig(loss="simpo"), None), optimiser, ranks=ranks)
    pairs = [PairExample((4, 5), (6, 7, 8 + n), (6, 9, 9, 10 + n), (IGNORED, 7, 8 + n), (IGNORED, 9, 9, 10 + n), 0.0) for n in range(5)]
    batches = [pack_pairs(pairs[:1]), pack_pairs(pairs[1:4]), pack_pairs(pairs[4:])]
    return step([batches[n] for n in ranks.share(len(batches))], 0, 1e-3), optimiser.grads


def refused(ranks):
    """Whether a step is refused, and the weights kept, when the last rank alone has a gradient that is not finite."""
    decoder = make_decoder()
    before = decoder.norm.weight.detach().clone()
    if ranks.rank == ranks.world - 1:
        decoder.embed.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig(), ranks=ranks)
    report = step([pack(make_examples((7, 5)))], 0, 1e-3)
    return report.skipped, torch.equal(before, decoder.norm.weight)


def run(ranks, folder, steps):
    """A run of the loop: where it stands, and weights and averages at its end."""
    decoder = moe()
    optimiser = Optimiser(decoder, OPTIMISER, 16)
    average = MovingAverage(optimiser, window=200)
    seen = []
    progress = train(
        Step(decoder, optimiser, LOSSES, ranks=ranks),
        decoder,
        DATA,
        ScheduleConfig(peak=1e-3, shape="constant"),
        RunConfig(steps=steps, accumulate=3, save_every=2),
        folder,
        "f",
        average=average,
        on_report=lambda report: seen.append(report.loss),
        ranks=ranks,
    )
    weights = {name: whole(p.detach()).clone() for name, p in decoder.named_parameters()}
    return progress, weights, {name: whole(value).clone() for name, value in average.weights.items()}, seen


def told(ranks):
    """What a rank hears when the first one fails at what is done once."""

    def fail():
        raise RunError("the disk is full")

    try:
        ranks.once(fail)
    except RunError as error:
        return str(error)
    return None


def everything(ranks, folder):
    """All facts, in one start of the processes."""
    return {
        "language": language(ranks),
        "preference": preference(ranks),
        "refused": refused(ranks),
        "told": told(ranks),
        "run": run(ranks, folder / "run", 4),
        "sums": ranks.sums([1.0, ranks.rank]),
        "order": ranks.in_order([bytes([n]) * 32 for n in ranks.share(3)], 3),
    }


def go_on(ranks, folder):
    """Two more steps of the run that stands in the folder."""
    return run(ranks, folder / "run", 6)


def alone():
    """`everything` without others, but for what needs them."""
    return {"language": language(ALONE), "preference": preference(ALONE)}
