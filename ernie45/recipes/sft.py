"""`ernie sft MODEL --data FILES --out FOLDER`: teach a model from conversations, all weights or low-rank adapters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ernie45.config import Environment
from ernie45.nn.lora import LoraConfig
from ernie45.recipes.events import Events
from ernie45.recipes.learning import (
    BadRows,
    LearningConfig,
    Pupil,
    Watcher,
    add_adapters,
    digest_of_ids,
    open_pupil,
    plain_settings,
    plan_text,
    prepare,
    write_result,
)
from ernie45.recipes.samples import Samples
from ernie45.train.checkpoint import fingerprint
from ernie45.train.examples import PackedExamples, make_examples
from ernie45.train.loop import RunConfig, train
from ernie45.train.optim import Optimiser
from ernie45.train.records import read_records
from ernie45.train.step import Step

_WITHOUT_EFFECT = ("out", "save_every", "dry_run", "skip_bad", "recompute", "samples", "sample_tokens", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class SftConfig(LearningConfig):
    """Teach a model from conversations: it learns the answers, not the questions."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, Hub name, or `starter`."""
    data: tuple[Path, ...]
    """Files, folders or patterns of .jsonl, .json, .csv or .txt: src/tgt, messages, alpaca, sharegpt or plain text."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters; `--lora.rank 0` trains all weights."""
    chat_format: str | None = None
    """How conversations are written, for a base model that has no template of its own."""


def run(config: SftConfig, environment: Environment) -> int:
    """Train, and say where the result is."""
    target = sft(config, environment)
    if target is not None:
        print(f"{target}: ready; try: ernie chat {target}")
    return 0


def sft(config: SftConfig, environment: Environment) -> Path | None:
    """Train as `config` says. Returns the folder of the finished model, None for a dry run.

    Raises DataError (file, line, field), CheckpointError, ConfigError or RunError.
    """
    if not config.dry_run:
        prepare(config.out, plain_settings(config))
    pupil = open_pupil(config.model, config.dtype, environment)
    data, bad = _data(config, pupil)
    steps = config.steps if config.steps is not None else -(-data.count(config.epochs) // config.accumulate)
    if config.lora.rank:
        add_adapters(pupil.decoder, config.lora, config.seed)
    facts = {
        "computed in": f"{pupil.loaded.compute.dtype}".removeprefix("torch."),
        "examples": len(data.examples),
        "left out": len(bad.errors),
        "tokens": sum(len(example.ids) for example in data.examples),
        "learned": sum(example.learned for example in data.examples),
        "steps": f"{steps:,} of {config.accumulate} x at most {config.batch_tokens:,} tokens; {data.count(1):,} batches an epoch",
    }
    print(plan_text(pupil.decoder, facts))
    if config.dry_run:
        return None
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size)
    learner = Step(pupil.decoder, optimiser, config.losses, recompute=config.recompute)
    same = plain_settings(config, *_WITHOUT_EFFECT) | {"steps": steps, "ids": digest_of_ids(example.ids for example in data.examples)}
    length = RunConfig(steps=steps, accumulate=config.accumulate, save_every=config.save_every)
    samples = Samples(pupil.decoder, pupil.tokenizer, pupil.template(config.chat_format), config.out, config.samples, config.sample_tokens)
    with Watcher(steps, Events(config.out) if config.tensorboard else None) as watcher:
        progress = train(
            learner, pupil.decoder, data, config.schedule, length, config.out, fingerprint(same), on_report=watcher, on_saved=samples
        )
    learner.watch.close()
    how = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all weights"
    card = (
        f"# Fine-tuned from {config.model}\n\nSupervised fine-tuning with ernie45: {how}, {progress.step:,} steps, "
        f"{progress.tokens:,} tokens. The settings stand in `settings.json` of the run. The licence of the base model applies.\n"
    )
    return write_result(pupil, config.out / "model", config.lora if config.lora.rank else None, card)


def _data(config: SftConfig, pupil: Pupil) -> tuple[PackedExamples, BadRows]:
    """The examples, checked against the model's limits."""
    limit = pupil.decoder.config.max_positions
    bad = BadRows()
    on_bad = bad if config.skip_bad else None
    records = read_records(config.data, on_bad)
    template = pupil.template(config.chat_format)
    examples = make_examples(records, template, pupil.tokenizer, min(limit, config.batch_tokens), on_bad=on_bad)
    return PackedExamples(examples, config.batch_tokens, config.seed), bad
