"""`ernie sft MODEL --data FILES --out FOLDER`: teach a model from conversations, all weights or low-rank adapters."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ernie45.config import Environment
from ernie45.errors import ConfigError, DataError
from ernie45.parallel.ranks import ALONE, Ranks, open_ranks
from ernie45.quant.fp8_qat import ONLINE_PASSES
from ernie45.quant.spec import parse_scheme
from ernie45.recipes.learning import BadRows, Pupil, digest_of_ids, ids_of, keeping, spread, state_folder, through_rounding
from ernie45.recipes.lesson import Lesson, LessonConfig, announce, open_lesson, teach
from ernie45.recipes.seeing import picture_facts
from ernie45.train.batch import TrainBatch, pack
from ernie45.train.evaluate import HeldOut
from ernie45.train.examples import PackedExamples, make_examples
from ernie45.train.noise import EmbeddingNoise
from ernie45.train.optim import Optimiser
from ernie45.train.records import Record, read_weighted
from ernie45.train.step import Step


@dataclass(frozen=True, kw_only=True)
class SftConfig(LessonConfig):
    """Teach a model from conversations: it learns the answers, not the questions."""

    neftune: float = 0.0
    """Noise on the embeddings while learning (NEFTune), such as 5; 0 is none."""
    qat: str | None = None
    """Learn through the rounding of a scheme, such as w4a8 or fp8-tensor-static-h (QAT): the result is quantised. Needs `--lora.rank 0`."""
    qat_head: str = "w8a8"
    """With `qat`: scheme of the output head and an embedding tied to it."""
    qat_online: int = ONLINE_PASSES
    """With `qat` to static FP8 activations: batches whose own largest value scales them; from then on a moving average of these does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.neftune) and self.neftune >= 0):
            raise ConfigError(f"neftune must be a number of at least 0, such as 5, not {self.neftune}")
        if self.qat is not None:
            for word in (self.qat, self.qat_head):
                if getattr(parse_scheme(word), "code", ""):
                    raise ConfigError(f"qat learns through rounding to 4 or 8 bits, and {word} is a code; take w4a8, w8a8, w4a16 or w8a16")
            if self.qat_online < 0:
                raise ConfigError(f"qat_online must be a number of batches of at least 0, not {self.qat_online}")
            if self.precision != "dtype":
                raise ConfigError(
                    f"qat rounds to what the result is packed as, and precision {self.precision} rounds otherwise; give one of the two"
                )
            if "-static" in self.qat and (self.stage != "joint" or self.freeze):
                raise ConfigError(f"{self.qat} finds its scales where weights learn; train all of them (--stage joint, no --freeze)")
            if self.lora.rank:
                raise ConfigError("qat trains all weights through their rounding; add --lora.rank 0")


def run(config: SftConfig, environment: Environment) -> int:
    """Train, and say where the result is."""
    with open_ranks(environment, config.rank_timeout, sharded=config.shard == "weights") as ranks:
        target = sft(config, environment, ranks)
    if target is not None and ranks.is_first:
        print(f"{target}: ready; try: ernie chat {target}")
    return 0


def sft(config: SftConfig, environment: Environment, ranks: Ranks = ALONE) -> Path | None:
    """Train as `config` says, together with the other `ranks`. Returns the folder of the finished model, None for a dry run.

    Raises DataError (file, line, field), CheckpointError, ConfigError or RunError.
    """
    pupil = open_lesson(config, environment, ranks)
    if config.qat is not None:
        if ranks.world > 1 and "-static" in config.qat:
            raise ConfigError(
                f"{config.qat} measures activations, which every rank would do for itself; run it in one process, or leave -static out"
            )
        pupil = through_rounding(pupil, config.qat, config.qat_head, config.qat_online)
    data, bad = _data(config, pupil)
    held_out = _held_out(config, pupil)
    steps = config.steps if config.steps is not None else -(-data.count(config.epochs) // config.accumulate)
    facts = {
        "examples": len(data.examples),
        "tokens": sum(len(example.ids) for example in data.examples),
        "learned": sum(example.learned for example in data.examples),
        **picture_facts(data.examples, pupil.vision, pupil.decoder.dtype.itemsize),
        "steps": f"{steps:,} of {config.accumulate} x at most {config.batch_tokens:,} tokens; {data.count(1):,} batches an epoch",
    }
    announce(config, pupil, bad, facts)
    if config.dry_run:
        return None
    way = spread(pupil, config.samples)
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size, state_folder(config))
    noise = EmbeddingNoise(config.neftune, config.seed) if config.neftune else None
    learner = Step(
        pupil.decoder, optimiser, config.losses, recompute=config.recompute, noise=noise, ranks=ranks, run=way, keep=keeping(config, pupil)
    )
    lesson = Lesson(
        learner=learner,
        data=data,
        steps=steps,
        digest=digest_of_ids(ids_of(example) for example in data.examples),
        title="Fine-tuned",
        method="Supervised fine-tuning",
        evaluate=HeldOut(pupil.decoder, held_out, ranks=ranks, run=way) if held_out else None,
    )
    target = teach(config, pupil, way, lesson)
    learner.watch.close()
    return target


def _data(config: SftConfig, pupil: Pupil) -> tuple[PackedExamples, BadRows]:
    """The examples, checked against the model's limits."""
    bad = BadRows(pupil.ranks)
    on_bad = bad if config.skip_bad else None
    records = read_weighted(config.data, config.weights, config.seed, on_bad)
    return _packed(config, pupil, records, config.seed, on_bad), bad


def _held_out(config: SftConfig, pupil: Pupil) -> list[TrainBatch]:
    """The batches whose loss is measured beside the training; a bad row among them always ends the run."""
    if not config.held_out:
        return []
    examples = _packed(config, pupil, read_weighted(config.held_out, (), config.seed, None), 0, None)
    return [examples.batch(number) for number in range(examples.count(1))]


def _packed(
    config: SftConfig, pupil: Pupil, records: Iterable[Record], seed: int, on_bad: Callable[[DataError], None] | None
) -> PackedExamples:
    text = pupil.decoder.config
    limit = min(text.max_positions, config.batch_tokens)
    gallery = pupil.gallery(config)
    template = pupil.template(config.chat_format)
    examples = make_examples(records, template, pupil.tokenizer, limit, on_bad=on_bad, gallery=gallery, vocabulary=text.vocab_size)
    return PackedExamples(examples, config.batch_tokens, seed, pack if gallery is None else gallery.pack)
