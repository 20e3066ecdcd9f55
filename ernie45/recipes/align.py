"""`ernie align MODEL --data PAIRS --out FOLDER`: prefer the better of two answers, by DPO or its kin."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ernie45.config import Environment
from ernie45.nn.lora import without_adapters
from ernie45.parallel.ranks import ALONE, Ranks, open_ranks
from ernie45.recipes.learning import BadRows, Pupil, digest_of_ids, open_pupil
from ernie45.recipes.lesson import LessonConfig, announce, open_lesson, teach
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PackedPairs, PreferenceStep, Reference, make_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.records import read_weighted
from ernie45.train.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig(LessonConfig):
    """Teach a model to prefer the better of two answers."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(weight_decay=0.0))
    """How gradients become steps."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(peak=1e-5, shape="linear"))
    """The learning rate over the run."""


def run(config: AlignConfig, environment: Environment) -> int:
    """Train, and say where the result is."""
    with open_ranks(environment, config.rank_timeout) as ranks:
        target = align(config, environment, ranks)
    if target is not None and ranks.is_first:
        print(f"{target}: ready; try: ernie chat {target}")
    return 0


def align(config: AlignConfig, environment: Environment, ranks: Ranks = ALONE) -> Path | None:
    """Train as `config` says, together with the other `ranks`. Returns the folder of the finished model, None for a dry run.

    Raises DataError (file, line, field), CheckpointError, ConfigError or RunError.
    """
    pupil = open_lesson(config, environment, ranks)
    data, bad = _data(config, pupil)
    batches = sum(len(data.packs(epoch)) for epoch in range(config.epochs))
    steps = config.steps if config.steps is not None else -(-batches // config.accumulate)
    facts = {
        "pairs": len(data.examples),
        "tokens": sum(pair.num_tokens for pair in data.examples),
        "steps": f"{steps:,} of {config.accumulate} x at most {config.batch_tokens:,} tokens; {len(data.packs(0)):,} batches an epoch",
    }
    announce(config, pupil, bad, facts)
    if config.dry_run:
        return None
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size)
    reference = _reference(config, pupil, environment)
    learner = PreferenceStep(pupil.decoder, optimiser, config.preference, reference, recompute=config.recompute, ranks=ranks)
    ids = digest_of_ids((*pair.prefix, -1, *pair.chosen, -1, *pair.rejected) for pair in data.examples)
    method = f"Preference training ({config.preference.loss}) with ernie45"
    return teach(config, pupil, learner, data, steps, ids, lambda how: f"# Aligned from {config.model}\n\n{method}: {how}.")


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
    bad = BadRows(pupil.ranks)
    on_bad = bad if config.skip_bad else None
    limit = min(pupil.decoder.config.max_positions, config.batch_tokens)
    records = read_weighted(config.data, config.weights, config.seed, on_bad)
    pairs = make_pairs(records, pupil.template(config.chat_format), limit, on_bad)
    return PackedPairs(pairs, config.batch_tokens, config.seed), bad
