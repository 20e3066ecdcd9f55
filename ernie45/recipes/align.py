"""`ernie align MODEL --data PAIRS --out FOLDER`: prefer the better of two answers, by DPO or its kin."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ernie45.config import Environment
from ernie45.nn.lora import LoraConfig, without_adapters
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
from ernie45.train.loop import RunConfig, train
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PackedPairs, PreferenceStep, Reference, make_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.records import read_records
from ernie45.train.schedule import ScheduleConfig

_WITHOUT_EFFECT = ("out", "save_every", "dry_run", "skip_bad", "recompute", "samples", "sample_tokens", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(LearningConfig):
    """Teach a model to prefer the better of two answers."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, Hub name, or `starter`; it is also the reference."""
    data: tuple[Path, ...]
    """Files, folders or patterns of pairs: src + tgt + response + sort, or prompt + chosen + rejected."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters; `--lora.rank 0` trains all weights."""
    chat_format: str | None = None
    """How conversations are written, for a base model that has no template of its own."""
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(weight_decay=0.0))
    """How gradients become steps."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(peak=1e-5, shape="linear"))
    """The learning rate over the run."""


def run(config: AlignConfig, environment: Environment) -> int:
    """Train, and say where the result is."""
    target = align(config, environment)
    if target is not None:
        print(f"{target}: ready; try: ernie chat {target}")
    return 0


def align(config: AlignConfig, environment: Environment) -> Path | None:
    """Train as `config` says. Returns the folder of the finished model, None for a dry run.

    Raises DataError (file, line, field), CheckpointError, ConfigError or RunError.
    """
    if not config.dry_run:
        prepare(config.out, plain_settings(config))
    pupil = open_pupil(config.model, config.dtype, environment)
    data, bad = _data(config, pupil)
    batches = sum(len(data.packs(epoch)) for epoch in range(config.epochs))
    steps = config.steps if config.steps is not None else -(-batches // config.accumulate)
    if config.lora.rank:
        add_adapters(pupil.decoder, config.lora, config.seed)
    facts = {
        "computed in": f"{pupil.loaded.compute.dtype}".removeprefix("torch."),
        "pairs": len(data.examples),
        "left out": len(bad.errors),
        "tokens": sum(pair.num_tokens for pair in data.examples),
        "steps": f"{steps:,} of {config.accumulate} x at most {config.batch_tokens:,} tokens; {len(data.packs(0)):,} batches an epoch",
    }
    print(plan_text(pupil.decoder, facts))
    if config.dry_run:
        return None
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size)
    learner = PreferenceStep(
        pupil.decoder, optimiser, config.preference, _reference(config, pupil, environment), recompute=config.recompute
    )
    ids = digest_of_ids((*pair.prefix, -1, *pair.chosen, -1, *pair.rejected) for pair in data.examples)
    same = plain_settings(config, *_WITHOUT_EFFECT) | {"steps": steps, "ids": ids}
    length = RunConfig(steps=steps, accumulate=config.accumulate, save_every=config.save_every)
    samples = Samples(pupil.decoder, pupil.tokenizer, pupil.template(config.chat_format), config.out, config.samples, config.sample_tokens)
    with Watcher(steps, Events(config.out) if config.tensorboard else None) as watcher:
        progress = train(
            learner, pupil.decoder, data, config.schedule, length, config.out, fingerprint(same), on_report=watcher, on_saved=samples
        )
    how = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all weights"
    card = (
        f"# Aligned from {config.model}\n\nPreference training ({config.preference.loss}) with ernie45: {how}, {progress.step:,} steps, "
        f"{progress.tokens:,} tokens. The settings stand in `settings.json` of the run. The licence of the base model applies.\n"
    )
    return write_result(pupil, config.out / "model", config.lora if config.lora.rank else None, card)


def _reference(config: AlignConfig, pupil: Pupil, environment: Environment) -> Reference | None:
    """With adapters the same weights without them; else the model a second time, whose weights are views of its files."""
    if not config.preference.needs_reference:
        return None
    if config.lora.rank:
        return Reference(pupil.decoder, lambda: without_adapters(pupil.decoder))
    frozen = open_pupil(config.model, config.dtype, environment).decoder
    return Reference(frozen.eval().requires_grad_(False), nullcontext)


def _data(config: AlignConfig, pupil: Pupil) -> tuple[PackedPairs, BadRows]:
    """The pairs, checked against the model's limits."""
    bad = BadRows()
    on_bad = bad if config.skip_bad else None
    limit = min(pupil.decoder.config.max_positions, config.batch_tokens)
    pairs = make_pairs(read_records(config.data, on_bad), pupil.template(config.chat_format), limit, on_bad)
    return PackedPairs(pairs, config.batch_tokens, config.seed), bad
