"""Step for step beside TRL (with PEFT for adapters): the same examples, the same start, the same losses.

TRL pads its batches and we pack ours; both divide by the number of learned labels of the whole step. TRL is in the `peers` group of
packages, which `make test` installs.
"""

import warnings

import pytest
import torch

from ernie45.models.adapters import save_adapter
from ernie45.models.save import save_model
from ernie45.nn.lora import LoraConfig, adapt
from ernie45.train.batch import pack
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples

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
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import Table
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": list(e.ids), "labels": list(e.labels)} for e in examples]
    data = Dataset(InMemoryTable(Table.from_pylist(rows)), fingerprint="rows")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")
    settings = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_epsilon=config.eps,
        max_grad_norm=config.clip,
        optim="adamw_torch",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line["loss"] for line in logged], [line["grad_norm"] for line in logged]


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
