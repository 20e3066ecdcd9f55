"""Step for step beside TRL (with PEFT for adapters): the same examples, the same start, the same losses.

TRL pads its batches and we pack ours; both divide by the number of learned labels of the whole step.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch

from ernie45.models.adapters import save_adapter
from ernie45.models.save import save_model
from ernie45.nn.lora import LoraConfig, adapt
from ernie45.train.batch import pack
from ernie45.train.comparison import ComparisonStep
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PairJudge, Reference, pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples
from tests.train.test_preference import make_pair

RATE = 3e-3
STEPS = 4
# losses around 6 in float32 over a few steps of Adam, whose first steps divide gradients by their own size
CLOSE = 1e-5


def our_losses(decoder, examples, config):
    learner = Step(decoder, Optimiser(decoder, config, 32), LossConfig())
    reports = []
    for step in range(STEPS):
        rows = examples[4 * step : 4 * step + 4]
        reports.append(learner([pack(rows[:2]), pack(rows[2:])], step, RATE))
    return [report.loss for report in reports], [report.norm for report in reports]


def trl_losses(model, examples, config, folder):
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": list(e.ids), "labels": list(e.labels)} for e in examples]
    settings = SFTConfig(
        **trl_settings(folder, config.beta2),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_epsilon=config.eps,
        max_grad_norm=config.clip,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(model, settings, train_dataset=rows_of(rows), processing_class=tokenizer_of_words())
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line["loss"] for line in logged], [line["grad_norm"] for line in logged]


def trl_settings(folder, beta2=0.95):
    """What all of TRL's trainers are told: a constant rate, our second moment, one line a step, nothing kept, no progress bar."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": beta2,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }


def tokenizer_of_words():
    """512 words that nobody uses: the rows hold ids already, but TRL asks for a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")


def rows_of(rows):
    """A data set that datasets does not hash: its hashing needs more of pickle than every version gives."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import Table

    return Dataset(InMemoryTable(Table.from_pylist(rows)), fingerprint="rows")


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_trl(tmp_path, adapters):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    examples = make_examples([5, 9, 14, 7], seed=3) * STEPS
    config = OptimiserConfig(weight_decay=0.1)
    save_model(make_decoder(), tmp_path / "base")
    decoder, lora = make_decoder(), LoraConfig(rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        if adapters:
            adapt(decoder.requires_grad_(False).layers, lora, torch.Generator().manual_seed(0))
            save_adapter(decoder, tmp_path / "adapter", lora, str(tmp_path / "base"))
            theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
        expected = trl_losses(theirs, examples, config, tmp_path / "out")
    losses, norms = our_losses(decoder, examples, config)
    assert losses[0] - losses[-1] > 0.1
    assert losses == pytest.approx(expected[0], abs=CLOSE)
    assert norms == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo"), ("sppo", "sppo_hard"), ("nca", "nca_pair")]
)
@pytest.mark.filterwarnings("default")
def test_preference_losses_are_those_of_trl(tmp_path, ours, theirs):
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    pairs = [make_pair(seed, prompt=4 + seed, chosen=3 + seed, rejected=6) for seed in range(4)]
    save_model(make_decoder(), tmp_path / "base")
    rows = [{"prompt_ids": [*p.prefix, p.chosen[0]], "chosen_ids": list(p.chosen[1:]), "rejected_ids": list(p.rejected[1:])} for p in pairs]
    settings = DPOConfig(
        **trl_settings(tmp_path / "out"),
        loss_type=theirs,
        beta=0.3,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy, frozen = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *rest: dataset)
            trainer = DPOTrainer(policy, frozen, settings, train_dataset=rows_of(rows), processing_class=tokenizer_of_words())
            trainer.train()
    expected = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    decoder, reference = make_decoder(), Reference(make_decoder().requires_grad_(False), nullcontext)
    optimiser = Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 32)
    learner = ComparisonStep(PairJudge(decoder, PreferenceConfig(loss=ours, beta=0.3), reference), optimiser)
    losses = [learner([pack_pairs(pairs)], step, RATE).loss for step in range(STEPS)]
    assert losses[0] - losses[-1] > 0.01
    # a loss here is a square of up to 20 or a logarithm: float32 sums of log-probabilities around -40
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
