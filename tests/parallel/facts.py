"""What is compared between one process and several: the same functions run in both."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import torch

from ernie45.config import Environment
from ernie45.errors import RunError
from ernie45.models.released import tiny
from ernie45.nn.lora import LoraConfig, adapt, without_adapters
from ernie45.parallel.ranks import ALONE
from ernie45.parallel.shard import own_bytes, plainly, shard_weights
from ernie45.recipes.learning import put_together
from ernie45.recipes.sft import SftConfig, sft
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import pack
from ernie45.train.comparison import ComparisonStep
from ernie45.train.evaluate import HeldOut
from ernie45.train.examples import PackedExamples
from ernie45.train.loop import RunConfig, train
from ernie45.train.noise import EmbeddingNoise
from ernie45.train.optim import MovingAverage, Optimiser, OptimiserConfig
from ernie45.train.preference import PairExample, PairJudge, Reference, pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.step import LossConfig, Step
from tests.recipes.lessons import ROWS, chatting_folder
from tests.sighted import noise, noise_batch, sighted_decoder
from tests.train.conftest import make_decoder, make_examples

LOSSES = LossConfig(balance=0.1, z=0.1, orthogonal=0.1, mtp=0.3, bias_rate=0.125)
MICRO = [(7, 30), (5,), (12, 3, 9)]
"""Documents of three micro-batches: uneven in tokens, and not to be shared evenly by two."""
EVEN = [*MICRO, (4, 4)]
"""One more, for ranks that must run equally many."""
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


def share_held(decoder):
    """Of the decoder's numbers, how many this rank holds."""
    return sum(own_bytes(p) for p in decoder.parameters()) / sum(p.numel() * p.element_size() for p in decoder.parameters())


def moe():
    """A tiny mixture of experts with a multi-token predictor."""
    return make_decoder(replace(tiny(experts=True), num_mtp=1))


def biases(decoder):
    return {name: p.clone() for name, p in decoder.named_parameters() if name.endswith("selection_bias")}


def spread(decoder, ranks):
    """How the decoder is run: whole, or in shares."""
    return shard_weights(decoder, ranks) if ranks.sharded else plainly


def language(ranks, even=False, recompute=False):
    """Report, gradients and moved biases of one step."""
    decoder = moe()
    way = spread(decoder, ranks)
    optimiser = Keep(decoder, OptimiserConfig(), 16)
    step = Step(decoder, optimiser, LOSSES, recompute=recompute, noise=EmbeddingNoise(1.0, seed=7), ranks=ranks, run=way)
    batches = [pack(make_examples(lengths, seed)) for seed, lengths in enumerate(EVEN if even else MICRO)]
    report = step([batches[n] for n in ranks.share(len(batches))], 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads, biases(decoder)


def pictures(ranks, even=False):
    """Report, gradients and moved biases of one step over rows of which some have pictures, so that ranks differ in what they see."""
    decoder = sighted_decoder().train()
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(not name.endswith("selection_bias"))
    way = spread(decoder, ranks)
    optimiser = Keep(decoder, OptimiserConfig(), 32)
    step = Step(decoder, optimiser, LOSSES, ranks=ranks, run=way)
    batches = [
        noise_batch((5, noise(2, 3), 7, 8), (4, 6, 3)),
        noise_batch((4, 9, 11, 3)),
        noise_batch((9, noise(1, 2, 1), 3, noise(3, 1, 2), 5)),
    ]
    batches += [noise_batch((6, 3, 8))] if even else []
    report = step([batches[n] for n in ranks.share(len(batches))], 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads, biases(decoder)


def held_out(ranks):
    """The held-out loss of three batches, which two ranks cannot share evenly."""
    decoder = moe()
    way = spread(decoder, ranks)
    return HeldOut(decoder, [pack(make_examples(lengths, seed)) for seed, lengths in enumerate(MICRO)], ranks=ranks, run=way)().loss


def finished(ranks):
    """The share a rank holds after a measure of the held-out loss; on the first rank also the model as it is written then."""
    decoder = moe()
    HeldOut(decoder, [pack(make_examples(MICRO[0]))], ranks=ranks, run=shard_weights(decoder, ranks))()
    held = share_held(decoder)
    put_together(SimpleNamespace(decoder=decoder, ranks=ranks), dict(decoder.named_parameters()))
    return held, decoder.state_dict() if ranks.is_first else None


def preference(ranks, even=False):
    """Report and gradients of one step over pairs, whose reference is the model without its adapters."""
    decoder = make_decoder()
    decoder.requires_grad_(False)
    adapt(decoder.layers, LoraConfig(rank=2), torch.Generator().manual_seed(1))
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    way = spread(decoder, ranks)
    optimiser = Keep(decoder, OptimiserConfig(), 16)
    judge = PairJudge(decoder, PreferenceConfig(), Reference(decoder, lambda: without_adapters(decoder)))
    step = ComparisonStep(judge, optimiser, ranks=ranks, run=way)
    pairs = [PairExample((4, 5), (6, 7, 8 + n), (6, 9, 9, 10 + n), (IGNORED, 7, 8 + n), (IGNORED, 9, 9, 10 + n), 0.0) for n in range(5)]
    batches = [pack_pairs(pairs[:1]), pack_pairs(pairs[1:4]), pack_pairs(pairs[4:]), pack_pairs(pairs[:2])][: 4 if even else 3]
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


def run(ranks, folder, steps, kind="adamw", accumulate=3, data=DATA):
    """A run of the loop: where it stands, and weights and averages at its end."""
    decoder = moe()
    way = spread(decoder, ranks)
    optimiser = Optimiser(decoder, replace(OPTIMISER, kind=kind), 16)
    average = MovingAverage(optimiser, window=200)
    seen = []
    progress = train(
        Step(decoder, optimiser, LOSSES, ranks=ranks, run=way),
        decoder,
        data,
        ScheduleConfig(peak=1e-3, shape="constant"),
        RunConfig(steps=steps, accumulate=accumulate, save_every=2),
        folder,
        "f",
        average=average,
        on_report=lambda report: seen.append(report.loss),
        ranks=ranks,
    )
    weights = {name: whole(p.detach()).clone() for name, p in decoder.named_parameters()}
    return progress, weights, {name: whole(value).clone() for name, value in average.weights.items()}, seen


def resumed(ranks, folder):
    """Weights and losses of two steps with the held-out loss measured after each: in one go, and stopped after the first."""
    found = []
    for name, stops in (("whole", (2,)), ("stopped", (1, 2))):
        seen = []
        for steps in stops:
            decoder = moe()
            way = spread(decoder, ranks)
            optimiser = Optimiser(decoder, OPTIMISER, 16)
            train(
                Step(decoder, optimiser, LOSSES, ranks=ranks, run=way),
                decoder,
                DATA,
                ScheduleConfig(peak=1e-3, shape="constant"),
                RunConfig(steps=steps, accumulate=2, save_every=1, eval_every=1),
                folder / name,
                "f",
                on_report=lambda report: seen.append((report.loss, report.held_out_loss)),  # noqa: B023
                ranks=ranks,
                evaluate=HeldOut(decoder, [pack(make_examples(MICRO[0]))], ranks=ranks, run=way),
            )
        found.append((seen, {name: whole(p.detach()).clone() for name, p in decoder.named_parameters()}))
    return found


def told(ranks):
    """What a rank hears when the first one fails at what is done once."""

    def fail():
        raise RunError("the disk is full")

    try:
        ranks.once(fail)
    except RunError as error:
        return str(error)
    return None


def sampled(ranks, folder):
    """The losses of a lesson that the ranks share, and what its model said at two checkpoints, as the command leaves them in its folder."""
    ranks.once(lambda: (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS)))
    ranks.once(lambda: chatting_folder(folder / "base"))
    how = {
        "dtype": "float32",
        "batch_tokens": 80,
        "accumulate": 2,
        "steps": 2,
        "save_every": 1,
        "samples": ("What is up?", "Name a colour"),
        "sample_tokens": 12,
    }
    sft(SftConfig(model=str(folder / "base"), data=(folder / "rows.jsonl",), out=folder / "run", **how), Environment.read(), ranks)
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()], lines


def everything(ranks, folder):
    """All facts, in one start of the processes."""
    return {
        "language": language(ranks),
        "pictures": pictures(ranks),
        "preference": preference(ranks),
        "refused": refused(ranks),
        "told": told(ranks),
        "held_out": [held_out(ranks), held_out(replace(ranks, sharded=True))],
        "run": run(ranks, folder / "run", 4),
        "sums": ranks.sums([1.0, ranks.rank]),
        "shares": shares(replace(ranks, sharded=True), folder / "shares"),
        "order": ranks.in_order([bytes([n]) * 32 for n in ranks.share(3)], 3),
    }


def shares(ranks, folder):
    """The facts of weights in shares; also how many numbers this rank holds."""
    decoder = moe()
    shard_weights(decoder, ranks)
    return {
        "language": language(ranks, even=True),
        "pictures": pictures(ranks, even=True),
        "recompute": language(ranks, even=True, recompute=True)[:2],
        "preference": preference(ranks, even=True),
        "run": run(ranks, folder / "run", 2, kind="muon", accumulate=6),
        "held": share_held(decoder),
        "resumed": resumed(ranks, folder),
        "finished": finished(ranks),
    }


def go_on(ranks, folder):
    """Two more steps of the runs that stand in the folder."""
    shares = replace(ranks, sharded=ranks.world > 1)
    return {"run": run(ranks, folder / "run", 6), "shares": run(shares, folder / "shares" / "run", 4, kind="muon", accumulate=6)}


class Deadly:
    """Data that kills the last rank in its fifth step, while it makes the batches of the sixth ahead."""

    def __init__(self, ranks):
        self.dies = ranks.rank == ranks.world - 1

    def batch(self, index):
        if self.dies and index >= 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return DATA.batch(index)


def dies(ranks, folder):
    """A run whose last rank is killed."""
    return run(ranks, folder / "run", 6, data=Deadly(ranks))


def alone():
    """`everything` without others, but for what needs them."""
    even = {"language": language(ALONE, even=True), "pictures": pictures(ALONE, even=True), "preference": preference(ALONE, even=True)}
    return {"language": language(ALONE), "pictures": pictures(ALONE), "preference": preference(ALONE), "even": even}
