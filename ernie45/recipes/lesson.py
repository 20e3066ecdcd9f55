"""What `ernie sft` and `ernie align` share: the settings of learning from rows, and a run from a learner to a finished model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic

import tyro
from torch import nn

from ernie45.config import Environment
from ernie45.errors import ConfigError
from ernie45.models.adapters import put_adapters
from ernie45.nn.lora import LoraConfig
from ernie45.parallel.ranks import Ranks
from ernie45.parallel.shard import Run
from ernie45.recipes.bench.limits import float_peak
from ernie45.recipes.events import Events
from ernie45.recipes.learning import (
    WITHOUT_EFFECT,
    BadRows,
    LearningConfig,
    Pupil,
    Watcher,
    in_precision,
    open_pupil,
    plain_settings,
    prepare,
    put_together,
    refuse_packed,
    show_plan,
    within_memory,
    write_result,
)
from ernie45.recipes.samples import Samples
from ernie45.train.checkpoint import fingerprint
from ernie45.train.evaluate import Measured
from ernie45.train.examples import B, Batches
from ernie45.train.loop import Learner, RunConfig, train
from ernie45.train.stages import choose_learning
from ernie45.weights.digest import digest_of_model


@dataclass(frozen=True, kw_only=True)
class LessonConfig(LearningConfig):
    """How any training on rows runs."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, Hub name, or `starter`."""
    data: tuple[Path, ...]
    """Files, folders or patterns of rows (.jsonl, .json, .csv, .parquet, .txt); the guide lists what a row may be."""
    weights: tuple[float, ...] = ()
    """How often an epoch holds the rows of each name in `data`: 2 is twice, 0.5 is every second row; by default once each."""
    held_out: tuple[Path, ...] = ()
    """Files of rows, as `data` has them, that are not learned from: their loss is measured beside the training."""
    eval_every: int = 100
    """Steps between two measurements of the held-out loss."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters; `--lora.rank 0` trains all weights."""
    chat_format: str | None = None
    """How conversations are written, for a base model that has no template of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp8" and self.lora.rank:
            raise ConfigError("precision fp8 is for weights that learn, and beside adapters they do not; add --lora.rank 0")


def open_lesson(config: LessonConfig, environment: Environment, ranks: Ranks) -> Pupil:
    """Prepare the run's folder, unless nothing is to be done, and load the model that learns."""
    if not config.dry_run:
        ranks.once(lambda: prepare(config.out))
    pupil = open_pupil(config.model, config.dtype, environment, ranks)
    if not config.lora.rank:
        refuse_packed(pupil, "train adapters beside them (--lora.rank 8), or the original model")
        choose_learning(pupil.decoder, config.stage, config.freeze)
    elif config.stage != "joint" or config.freeze:
        raise ConfigError("stage and freeze choose among whole weights, and adapters leave all of them as they are; add --lora.rank 0")
    in_precision(config, pupil)
    return pupil


def announce(config: LessonConfig, pupil: Pupil, bad: BadRows, facts: Mapping[str, object]) -> None:
    """Put adapters on where they are wanted, and print the plan."""
    if config.lora.rank:
        put_adapters(pupil.decoder, config.lora, config.seed)
    common = {"computed in": f"{pupil.loaded.compute.dtype}".removeprefix("torch."), "left out": len(bad.errors)}
    show_plan(config, pupil, common | dict(facts))


@dataclass(frozen=True, kw_only=True)
class Lesson(Generic[B]):
    """What is learned from what, for how long; `title` and `method` are words of the card that goes with the model."""

    learner: Learner[B]
    data: Batches[B]
    steps: int
    digest: str
    """Of the data."""
    title: str
    method: str
    evaluate: Callable[[], Measured] | None = None
    """Measures held-out rows."""
    whole: nn.Module | None = None
    """What learns, where that is more than the decoder."""


def teach(config: LessonConfig, pupil: Pupil, way: Run, lesson: Lesson[Any]) -> Path:
    """Run the steps and write the model with its card. way: how passes of the pupil are run.

    Raises RunError as `train` does. Returns the folder of the finished model.
    """
    same = plain_settings(config, *WITHOUT_EFFECT) | {"steps": lesson.steps, "ids": lesson.digest, "base": digest_of_model(pupil.folder)}
    length = RunConfig(steps=lesson.steps, accumulate=config.accumulate, save_every=config.save_every, eval_every=config.eval_every)
    template, gallery = pupil.template(config.chat_format), pupil.gallery(config)
    rules = gallery.rules if gallery is not None else None
    samples = Samples(pupil.decoder, pupil.tokenizer, template, config.out, config.samples, config.sample_tokens, rules)
    events = Events(config.out) if config.tensorboard else None
    with Watcher(lesson.steps, events) as watcher, within_memory(config, pupil, way, lesson.data.batch(0)) as again:
        progress = train(
            lesson.learner,
            pupil.decoder if lesson.whole is None else lesson.whole,
            lesson.data,
            config.schedule,
            length,
            config.out,
            fingerprint(same),
            on_report=watcher,
            on_saved=samples,
            ranks=pupil.ranks,
            peak=float_peak(pupil.decoder.dtype),
            again=again,
            evaluate=lesson.evaluate,
            settings=plain_settings(config),
        )
    how = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all weights"
    card = (
        f"# {lesson.title} from {config.model}\n\n{lesson.method} with ernie45: {how}, {progress.step:,} steps, {progress.tokens:,} tokens."
    )
    card += " The settings stand in `settings.json` of the run. The licence of the base model applies.\n"
    target = config.out / "model"
    if pupil.ranks.sharded:
        put_together(pupil, dict(pupil.decoder.named_parameters()))
    pupil.ranks.once(lambda: write_result(pupil, target, config.lora if config.lora.rank else None, card))
    return target
