"""The held-out loss is the plain mean over labels, and measuring it changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ernie45.errors import DataError
from ernie45.nn.attention import PackedCausal
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, pack
from ernie45.train.comparison import Compared, HeldOutAnswers
from ernie45.train.evaluate import HeldOut
from ernie45.train.examples import PackedExamples
from ernie45.train.loop import LOG, RunConfig, train
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples

EXAMPLES = make_examples((7, 12, 5), seed=9)


def test_the_loss_is_the_mean_over_the_labels_of_all_batches():
    decoder = make_decoder(experts=True)
    found = HeldOut(decoder, [pack(EXAMPLES[:2]), pack(EXAMPLES[2:])])().loss
    losses = []
    with torch.no_grad():
        for example in EXAMPLES:
            ids = torch.tensor(example.ids)
            logits = decoder.logits(decoder(decoder.embed(ids), torch.arange(len(ids)), PackedCausal([len(ids)])))
            losses.append(F.cross_entropy(logits[:-1].double(), torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="none"))
    expected = torch.cat(losses).sum().item() / sum(example.learned for example in EXAMPLES)
    assert found == pytest.approx(expected, abs=1e-5)


def run(folder, evaluate, every):
    decoder = make_decoder(experts=True)
    learner = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig(balance=0.1, bias_rate=0.1))
    data = PackedExamples(make_examples([5, 9, 14]), limit=24, seed=1)
    config = RunConfig(steps=5, eval_every=every)
    evaluate = HeldOut(decoder, [pack(EXAMPLES)]) if evaluate else None
    train(learner, decoder, data, ScheduleConfig(peak=1e-2), config, folder, "f", evaluate=evaluate)
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_it_is_measured_every_so_many_steps_and_at_the_end_and_disturbs_nothing(tmp_path):
    without, found = run(tmp_path / "a", False, 1), run(tmp_path / "b", True, 2)
    assert [line["step"] for line in found if "held_out_loss" in line] == [1, 3, 4]
    for name in ("loss", "norm", "load"):
        assert [line[name] for line in found] == [line[name] for line in without]


def test_of_answers_the_share_that_is_judged_rightly_is_measured_too():
    batches = [Compared(torch.tensor([0.5, 1.0]), torch.tensor([0.3, -0.1])), Compared(torch.tensor([3.0]), torch.tensor([0.0]))]
    measured = HeldOutAnswers(lambda batch: batch.compared, [SimpleNamespace(compared=c, num_compared=len(c.losses)) for c in batches])()
    assert measured == (pytest.approx(1.5), pytest.approx(1 / 3))


def test_rows_without_labels_are_refused():
    with pytest.raises(DataError, match="no learned label"):
        HeldOut(make_decoder(), [pack([Example((4, 5), (IGNORED, IGNORED))])])
