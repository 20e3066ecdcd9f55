"""`ernie align MODEL --data PAIRS --out FOLDER`: prefer the better of two answers, by DPO or its kin; KTO; reward models."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ernie45.config import Environment
from ernie45.errors import DataError
from ernie45.nn.lora import without_adapters
from ernie45.parallel.ranks import ALONE, Ranks, open_ranks
from ernie45.plan.flops import Compares, Passes, comparison_work
from ernie45.recipes.learning import BadRows, Pupil, digest_of_ids, in_precision, keeping, open_pupil, spread, state_folder
from ernie45.recipes.lesson import Lesson, LessonConfig, announce, open_lesson, teach
from ernie45.recipes.seeing import picture_facts
from ernie45.train.comparison import ComparisonStep, HeldOutAnswers, Judge
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PackedRows, PairExample, PairJudge, PreferenceBatch, Reference, as_pair, make_each, pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.records import Record, read_weighted
from ernie45.train.reward import RewardJudge, RewardModel
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.unpaired import JudgedExample, UnpairedJudge, as_judged, pack_judged


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
    with open_ranks(environment, config.rank_timeout, sharded=config.shard == "weights") as ranks:
        target = align(config, environment, ranks)
    if target is not None and ranks.is_first:
        judges = config.preference.loss == "reward"
        print(
            f"{target}: ready; " + ("it judges answers: ernie45.train.reward.load_reward_model" if judges else f"try: ernie chat {target}")
        )
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
        "answers" if config.preference.loss == "kto" else "pairs": len(data.examples),
        "tokens": sum(example.num_tokens for example in data.examples),
        "steps": f"{steps:,} of {config.accumulate} x at most {config.batch_tokens:,} tokens; {len(data.packs(0)):,} batches an epoch",
        **picture_facts(data.examples, pupil.vision, pupil.decoder.dtype.itemsize),
    }
    announce(config, pupil, bad, facts)
    if config.dry_run:
        return None
    way = spread(pupil, config.samples)
    judge, scorer = _judge(config, pupil, environment)
    optimiser = Optimiser(scorer or pupil.decoder, config.optimiser, pupil.decoder.config.head_size, state_folder(config))
    work = partial(comparison_work, pupil.decoder.config, pupil.vision, Passes.of(optimiser.parameters), _kind(config))
    learner = ComparisonStep(judge, optimiser, ranks=ranks, run=way, keep=keeping(config, pupil), work=work)
    held_out = _held_out(config, pupil)
    lesson = Lesson(
        learner=learner,
        data=data,
        steps=steps,
        digest=digest_of_ids(_ids(example) for example in data.examples),
        title="Reward model" if scorer else "Aligned",
        method="A reward model trained" if scorer else f"Preference training ({config.preference.loss})",
        evaluate=HeldOutAnswers(judge, held_out, ranks, way) if held_out else None,
        whole=scorer,
    )
    target = teach(config, pupil, way, lesson)
    if scorer is not None:
        ranks.once(lambda: scorer.save_head(target))
    return target


def _judge(config: AlignConfig, pupil: Pupil, environment: Environment) -> tuple[Judge[Any], RewardModel | None]:
    """What compares the answers; and the reward model, where that is what learns."""
    loss, decoder = config.preference, pupil.decoder
    if loss.loss == "reward":
        model = RewardModel(decoder).initialise(torch.Generator().manual_seed(config.seed))
        return RewardJudge(model, loss, recompute=config.recompute), model
    reference = _reference(config, pupil, environment)
    if loss.loss == "kto":
        assert reference is not None, "KTO compares with a reference"
        return UnpairedJudge(decoder, loss, reference, recompute=config.recompute), None
    return PairJudge(decoder, loss, reference, recompute=config.recompute), None


def _kind(config: AlignConfig) -> Compares:
    """What a comparison computes: a reference's pass beside the policy's, or rewards without a head over words."""
    if config.preference.loss == "reward":
        return "rewards"
    return "with reference" if config.preference.needs_reference else "policy"


def _ids(example: PairExample | JudgedExample) -> tuple[int, ...]:
    """What the fingerprint of a run knows of an example."""
    pictures = tuple(int.from_bytes(picture.digest) for picture in example.pictures)
    if isinstance(example, JudgedExample):
        return (*example.prefix, -1, *example.answer, int(example.good), *pictures)
    return (*example.prefix, -1, *example.chosen, -1, *example.rejected, *pictures)


def _reference(config: AlignConfig, pupil: Pupil, environment: Environment) -> Reference | None:
    """With adapters the same weights without them; else the model a second time, whose weights are views of its files."""
    if not config.preference.needs_reference:
        return None
    if config.lora.rank:
        return Reference(pupil.decoder, lambda: without_adapters(pupil.decoder))
    frozen = open_pupil(config.model, config.dtype, environment, pupil.ranks)
    in_precision(config, frozen)
    frozen.decoder.eval().requires_grad_(False)
    return Reference(frozen.decoder, nullcontext, spread(frozen, ()))


def _data(config: AlignConfig, pupil: Pupil) -> tuple[PackedRows[Any, Any], BadRows]:
    """The pairs or judged answers, checked against the model's limits."""
    bad = BadRows(pupil.ranks)
    on_bad = bad if config.skip_bad else None
    return _packed(config, pupil, read_weighted(config.data, config.weights, config.seed, on_bad), config.seed, on_bad), bad


def _held_out(config: AlignConfig, pupil: Pupil) -> list[PreferenceBatch]:
    """The batches whose loss is measured beside the training; a bad row among them always ends the run."""
    if not config.held_out:
        return []
    rows = _packed(config, pupil, read_weighted(config.held_out, (), config.seed, None), 0, None)
    return [rows.batch(number) for number in range(len(rows.packs(0)))]


def _packed(
    config: AlignConfig, pupil: Pupil, records: Iterable[Record], seed: int, on_bad: Callable[[DataError], None] | None
) -> PackedRows[Any, Any]:
    text = pupil.decoder.config
    limit = min(text.max_positions, config.batch_tokens)
    template, gallery = pupil.template(config.chat_format), pupil.gallery(config)
    if config.preference.loss == "kto":
        judged = make_each(records, lambda record: as_judged(record, template, gallery), limit, on_bad, text.vocab_size)
        return PackedRows(judged, config.batch_tokens, seed, partial(pack_judged, gallery=gallery))
    pairs = make_each(records, lambda record: [as_pair(record, template, gallery)], limit, on_bad, text.vocab_size)
    return PackedRows(pairs, config.batch_tokens, seed, partial(pack_pairs, gallery=gallery))
