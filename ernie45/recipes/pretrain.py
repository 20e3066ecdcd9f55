"""`ernie pretrain`: learn from a corpus, from nothing or from a model; `--prepare` turns texts into the corpus first."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from ernie45.config import Environment
from ernie45.errors import ConfigError, DataError
from ernie45.models.load import find_model
from ernie45.parallel.ranks import ALONE, Ranks, open_ranks
from ernie45.parallel.shard import Run
from ernie45.recipes.bench.limits import float_peak
from ernie45.recipes.events import Events
from ernie45.recipes.learning import (
    WITHOUT_EFFECT,
    BadRows,
    LearningConfig,
    Pupil,
    Watcher,
    keeping,
    open_pupil,
    plain_settings,
    plan_text,
    prepare,
    put_together,
    refuse_packed,
    spread,
    state_folder,
    within_memory,
    write_result,
)
from ernie45.recipes.samples import Samples
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer
from ernie45.train.checkpoint import fingerprint
from ernie45.train.evaluate import HeldOut
from ernie45.train.loop import RunConfig, train
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.train.records import Document, read_records
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.shards import open_corpus, write_corpus
from ernie45.train.step import LossConfig, Step
from ernie45.train.stream import Source, Stream


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LearningConfig):
    """Learn every token of a corpus, with the family's router losses where the model has experts."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, Hub name, or `starter`: its tokenizer, its shape, and unless `fresh` its weights."""
    data: tuple[Path, ...]
    """Corpora, named without suffix; with `prepare` the texts to make one of (.jsonl, .json, .csv, .txt)."""
    weights: tuple[float, ...] = ()
    """Share of each corpus in the rows; by default in proportion to their tokens."""
    held_out: tuple[Path, ...] = ()
    """Corpora that are not learned from: their loss is measured beside the training."""
    eval_every: int = 100
    """Steps between two measurements of the held-out loss."""
    prepare: Path | None = None
    """Write the texts in `data` as this corpus (named without suffix), and stop."""
    fresh: bool = False
    """Begin from random weights."""
    average_tokens: int = 0
    """Window of a moving average of the weights, in tokens; its model is written beside the other. 0: none."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(peak=3e-4, end=3e-6, warmup=100, shape="wsd"))
    """The learning rate over the run."""
    losses: LossConfig = field(default_factory=lambda: LossConfig(balance=1e-5, orthogonal=1e-3, bias_rate=1e-3))
    """What is learned beside the next token."""


def run(config: PretrainConfig, environment: Environment) -> int:
    """Prepare or train, and say where the result is."""
    if config.prepare is not None:
        _prepare(config, environment, config.prepare)
        return 0
    with open_ranks(environment, config.rank_timeout, sharded=config.shard == "weights") as ranks:
        target = pretrain(config, environment, ranks)
    if target is not None and ranks.is_first:
        print(f"{target}: ready")
    return 0


def _prepare(config: PretrainConfig, environment: Environment, target: Path) -> None:
    """Texts as a corpus."""
    tokenizer = load_tokenizer(find_model(config.model, environment))
    bad = BadRows()
    try:
        facts = write_corpus(target, _documents(config, tokenizer, bad), tokenizer.vocab_size, _show if sys.stderr.isatty() else _silent)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {facts.documents:,} documents, {facts.tokens:,} tokens; left out: {len(bad.errors)}")


def _documents(config: PretrainConfig, tokenizer: Tokenizer, bad: BadRows) -> Iterator[list[int]]:
    for record in read_records(config.data, bad if config.skip_bad else None):
        if not isinstance(record, Document):
            error = DataError(f"{record.where}: is a conversation; a corpus is made of texts (`text`, or `tgt` alone)")
            if not config.skip_bad:
                raise error
            bad(error)
        else:
            yield [*tokenizer.encode(record.text), *tokenizer.eos_ids[:1]]


def _show(documents: int, tokens: int) -> None:
    if documents % 1000 == 0:
        print(f"\r\x1b[K{documents:,} documents, {tokens:,} tokens", end="", file=sys.stderr, flush=True)


def _silent(documents: int, tokens: int) -> None:
    """Where nobody watches."""


def pretrain(config: PretrainConfig, environment: Environment, ranks: Ranks = ALONE) -> Path | None:
    """Train as `config` says, together with the other `ranks`. Returns the folder of the finished model, None for a dry run.

    Raises DataError, CheckpointError, ConfigError or RunError.
    """
    import torch

    if not config.dry_run:
        ranks.once(lambda: prepare(config.out, plain_settings(config)))
    pupil = open_pupil(config.model, config.dtype, environment, ranks)
    refuse_packed(pupil, "take the original model")
    if config.fresh:
        pupil.decoder.initialise(torch.Generator().manual_seed(config.seed))
    sources = _sources(config, pupil)
    tokens = sum(source.corpus.facts.tokens for source in sources)
    stream = Stream(sources, config.batch_tokens, config.seed)
    steps = config.steps if config.steps is not None else max(1, config.epochs * tokens // (config.batch_tokens * config.accumulate))
    facts = {
        "computed in": f"{pupil.loaded.compute.dtype}".removeprefix("torch."),
        "corpora": ", ".join(f"{source.name} ({source.corpus.facts.tokens:,} tokens, weight {source.weight:g})" for source in sources),
        "steps": f"{steps:,} of {config.accumulate} x {config.batch_tokens:,} tokens",
        "epochs": f"{steps * config.accumulate * config.batch_tokens / tokens:.2f}",
    }
    if ranks.is_first:
        print(plan_text(pupil.decoder, facts))
    if config.dry_run:
        return None
    way = spread(pupil, config.samples)
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size, state_folder(config))
    average = MovingAverage(optimiser, config.average_tokens) if config.average_tokens else None
    learner = Step(pupil.decoder, optimiser, config.losses, recompute=config.recompute, ranks=ranks, run=way, keep=keeping(config, pupil))
    digests = [source.corpus.facts.sha256_tokens for source in sources]
    same = plain_settings(config, *WITHOUT_EFFECT, "prepare", "epochs") | {"steps": steps, "corpora": digests}
    length = RunConfig(steps=steps, accumulate=config.accumulate, save_every=config.save_every, eval_every=config.eval_every)
    held_out = _held_out(config, pupil, way)
    samples = Samples(pupil.decoder, pupil.tokenizer, None, config.out, config.samples, config.sample_tokens)
    events = Events(config.out) if config.tensorboard else None
    with Watcher(steps, events) as watcher, within_memory(config, pupil, way, stream.batch(0).tokens_T) as again:
        progress = train(
            learner,
            pupil.decoder,
            stream,
            config.schedule,
            length,
            config.out,
            fingerprint(same),
            average=average,
            on_report=watcher,
            on_saved=samples,
            ranks=ranks,
            peak=float_peak(pupil.decoder.dtype),
            again=again,
            evaluate=held_out,
        )
    learner.watch.close()
    start = "random weights" if config.fresh else config.model
    names = ", ".join(source.name for source in sources)
    card = f"# Pre-trained from {start}\n\nernie45, {progress.step:,} steps, {progress.tokens:,} tokens of {names}.\n"
    target = config.out / "model"
    if pupil.ranks.sharded:
        put_together(pupil, dict(pupil.decoder.named_parameters()))
    ranks.once(lambda: write_result(pupil, target, None, card))
    if average is not None:
        put_together(pupil, average.weights)
        ranks.once(lambda: write_result(pupil, config.out / "model-averaged", None, card))
    return target


def _held_out(config: PretrainConfig, pupil: Pupil, way: Run) -> HeldOut | None:
    """The loss of every whole row of the held-out corpora."""
    if not config.held_out:
        return None
    sources = _sources(replace(config, data=config.held_out, weights=()), pupil)
    rows = max(1, sum(source.corpus.facts.tokens for source in sources) // config.batch_tokens)
    stream = Stream(sources, config.batch_tokens, config.seed)
    return HeldOut(pupil.decoder, [stream.batch(number) for number in range(rows)], ranks=pupil.ranks, run=way)


def _sources(config: PretrainConfig, pupil: Pupil) -> list[Source]:
    """The corpora, checked against the model."""
    corpora = [open_corpus(path) for path in config.data]
    if config.weights and len(config.weights) != len(corpora):
        raise ConfigError(f"weights has {len(config.weights)} numbers for {len(corpora)} corpora; give one for each")
    if config.batch_tokens > pupil.decoder.config.max_positions:
        room = pupil.decoder.config.max_positions
        raise ConfigError(f"batch_tokens is {config.batch_tokens:,}, more than the model's {room:,} positions")
    for corpus in corpora:
        if corpus.facts.vocabulary > pupil.decoder.config.vocab_size:
            raise DataError(
                f"{corpus.path}: was made with a vocabulary of {corpus.facts.vocabulary:,} words, the model has "
                f"{pupil.decoder.config.vocab_size:,}; prepare it with this model's tokenizer"
            )
    weights = config.weights or tuple(float(corpus.facts.tokens) for corpus in corpora)
    return [Source(corpus.path.name, corpus, weight) for corpus, weight in zip(corpora, weights, strict=True)]
