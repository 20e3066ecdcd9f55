"""KTO on single judged answers: step for step beside TRL, whose drift comes from the same mismatched answers."""

import warnings
from contextlib import nullcontext

import pytest
import torch

from ernie45.errors import DataError
from ernie45.models.save import save_model
from ernie45.tokens.template import IGNORED, family_template
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.train.comparison import ComparisonStep
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PackedRows, Reference, make_each
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.records import as_record
from ernie45.train.unpaired import JudgedExample, UnpairedJudge, as_judged, pack_judged
from tests.tokens.conftest import PLACEHOLDERS, TAGS, write_pieces_folder
from tests.train.conftest import make_decoder
from tests.train.test_trl import RATE, STEPS, rows_of, tokenizer_of_words, trl_settings


def make_judged(seed, prompt, answer, good):
    """Random ids; the row opens with the prompt, whose last token begins the learned part."""
    ids = torch.randint(3, 512, (prompt + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    own = tuple(ids[prompt - 1 :])
    return JudgedExample(tuple(ids[: prompt - 1]), own, (IGNORED, *own[1:]), good)


JUDGED = [make_judged(n, prompt=3 + 2 * n, answer=6 - n, good=n != 1) for n in range(4)]


@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_trl(tmp_path):
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer

    save_model(make_decoder(), tmp_path / "base")
    rows = []
    for n, own in enumerate(JUDGED):
        ids = {"prompt_ids": [*own.prefix, own.answer[0]], "completion_ids": list(own.answer[1:]), "label": own.good}
        rows.append({**ids, "KL_completion_ids": list(JUDGED[n - 1].answer[1:])})
    settings = KTOConfig(
        **trl_settings(tmp_path / "out"),
        beta=0.3,
        desirable_weight=0.7,
        undesirable_weight=1.5,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy, frozen = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KTOTrainer, "_prepare_dataset", lambda self, dataset, *rest: dataset)
            trainer = KTOTrainer(policy, frozen, settings, train_dataset=rows_of(rows), processing_class=tokenizer_of_words())
            trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    decoder, reference = make_decoder(), Reference(make_decoder().requires_grad_(False), nullcontext)
    config = PreferenceConfig(loss="kto", beta=0.3, desirable=0.7, undesirable=1.5)
    learner = ComparisonStep(UnpairedJudge(decoder, config, reference), Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 32))
    reports = [learner([pack_judged(JUDGED)], step, RATE) for step in range(STEPS)]
    assert reports[0].loss - reports[-1].loss > 0.1
    assert max(line["kl"] for line in logged) > 0.1  # the drift takes part
    # sums of log-probabilities around -40 in float32, over a few steps of Adam
    assert [report.loss for report in reports] == pytest.approx([line["loss"] for line in logged], rel=1e-4, abs=1e-5)
    assert [report.norm for report in reports] == pytest.approx([line["grad_norm"] for line in logged], rel=1e-3)


def test_good_answers_rise_and_bad_ones_fall():
    decoder, reference = make_decoder(experts=True), Reference(make_decoder(experts=True).requires_grad_(False), nullcontext)
    judge = UnpairedJudge(decoder, PreferenceConfig(loss="kto", beta=0.3), reference)
    learner = ComparisonStep(judge, Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 32))
    first, *_, last = [learner([pack_judged(JUDGED[:2]), pack_judged(JUDGED[2:3])], step, 3e-3) for step in range(8)]
    assert first.loss == pytest.approx(0.5, abs=1e-5)
    assert last.loss < 0.4
    assert last.accuracy == 1.0


def test_a_batch_holds_every_answer_twice_within_the_limit():
    data = PackedRows(JUDGED * 3, 45, 0, pack_judged)
    assert sorted(n for pack in data.packs(0) for n in pack) == list(range(12))
    for n, plan in enumerate(data.packs(0)):
        batch = data.batch(n)
        assert batch.num_tokens == sum(data.examples[place].num_tokens for place in plan) <= 45
        assert batch.good_P.tolist() == [data.examples[place].good for place in plan]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = write_pieces_folder(tmp_path_factory.mktemp("tokens") / "tagged", PLACEHOLDERS[:1] + TAGS)
    return family_template("ernie-text", load_tokenizer(folder))


ROW = {"prompt": "Name a colour", "completion": "Green", "label": True}


def test_rows_are_read(template):
    good, bad, *pair = make_each(
        [as_record(row, "f") for row in (ROW, {**ROW, "label": 0}, {"prompt": "Name a colour", "chosen": "Green", "rejected": "No"})],
        lambda record: as_judged(record, template),
        200,
    )
    assert (good.good, bad.good, [one.good for one in pair]) == (True, False, [True, False])
    assert good.prefix == bad.prefix == pair[0].prefix
    assert good.answer == bad.answer == pair[0].answer
    assert good.labels[0] == IGNORED
    assert good.labels[1:-1] == good.answer[1:-1]  # the last one learns the end of text in the place of a tag


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**ROW, "label": "good"}, "'label' must be true"),
        ({**ROW, "completion": 3}, "'completion' must be a list of at least one message"),
        ({"src": ["a"], "tgt": ["b"]}, "no judged answer"),
        ({**ROW, "completion": "b " * 100}, "more than the limit"),
    ],
)
def test_a_row_that_teaches_nothing_is_named(template, row, says):
    with pytest.raises(DataError, match=f"line 7.*{says}"):
        make_each([as_record(row, "f: line 7")], lambda record: as_judged(record, template), 60)
