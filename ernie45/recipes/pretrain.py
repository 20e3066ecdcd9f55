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
    digest_of_ids,
    ids_of,
    in_precision,
    keeping,
    open_pupil,
    plain_settings,
    prepare,
    put_together,
    refuse_packed,
    show_plan,
    spread,
    state_folder,
    within_memory,
    write_result,
)
from ernie45.recipes.samples import Samples
from ernie45.recipes.seeing import picture_facts
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer
from ernie45.train.batch import Example
from ernie45.train.checkpoint import fingerprint
from ernie45.train.evaluate import HeldOut
from ernie45.train.examples import PackedExamples, as_document, checked_examples
from ernie45.train.loop import RunConfig, train
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.train.picture_rows import Interleaved
from ernie45.train.records import SUFFIXES, Document, Record, read_records
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.shards import open_corpus, write_corpus
from ernie45.train.stages import choose_learning
from ernie45.train.step import LossConfig, Step
from ernie45.train.stream import RowSource, Source, Stream
from ernie45.weights.digest import digest_of_model


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LearningConfig):
    """Learn every token of a corpus, with the family's router losses where the model has experts."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, Hub name, or `starter`: its tokenizer, its shape, and unless `fresh` its weights."""
    data: tuple[Path, ...]
    """Corpora, named without suffix, and files, folders or patterns of rows with pictures; with `prepare` the texts to make a corpus of."""
    weights: tuple[float, ...] = ()
    """Share of each source in the batches; by default in proportion to their tokens."""
    held_out: tuple[Path, ...] = ()
    """Sources that are not learned from: their loss is measured beside the training."""
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
            what = "has pictures; name its file in `data` beside the corpora" if isinstance(record, Interleaved) else "is a conversation"
            error = DataError(f"{record.where}: {what}; a corpus is made of texts (`text`, or `tgt` alone)")
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
        ranks.once(lambda: prepare(config.out))
    pupil = open_pupil(config.model, config.dtype, environment, ranks)
    refuse_packed(pupil, "take the original model")
    in_precision(config, pupil)
    if config.fresh:
        pupil.decoder.initialise(torch.Generator().manual_seed(config.seed))
    choose_learning(pupil.decoder, config.stage, config.freeze)
    bad = BadRows(ranks)
    sources = _sources(config, pupil, bad)
    tokens = sum(source.room(config.batch_tokens) for source in sources)
    stream = Stream(sources, config.batch_tokens, config.seed)
    steps = config.steps if config.steps is not None else max(1, config.epochs * tokens // (config.batch_tokens * config.accumulate))
    seen = [example for source in sources if isinstance(source, RowSource) for example in source.rows.examples]
    facts = {
        "computed in": f"{pupil.loaded.compute.dtype}".removeprefix("torch."),
        "sources": ", ".join(f"{source.name} ({source.tokens:,} tokens, weight {source.weight:g})" for source in sources),
        "left out": len(bad.errors),
        **picture_facts(seen, pupil.vision, pupil.decoder.dtype.itemsize),
        "steps": f"{steps:,} of {config.accumulate} x {config.batch_tokens:,} tokens",
        "epochs": f"{steps * config.accumulate * config.batch_tokens / tokens:.2f}",
    }
    show_plan(config, pupil, facts)
    if config.dry_run:
        return None
    way = spread(pupil, config.samples)
    optimiser = Optimiser(pupil.decoder, config.optimiser, pupil.decoder.config.head_size, state_folder(config))
    average = MovingAverage(optimiser, config.average_tokens) if config.average_tokens else None
    learner = Step(pupil.decoder, optimiser, config.losses, recompute=config.recompute, ranks=ranks, run=way, keep=keeping(config, pupil))
    digests = [_digest(source) for source in sources]
    same = plain_settings(config, *WITHOUT_EFFECT, "prepare", "epochs")
    same |= {"steps": steps, "corpora": digests, "base": digest_of_model(pupil.folder)}
    length = RunConfig(steps=steps, accumulate=config.accumulate, save_every=config.save_every, eval_every=config.eval_every)
    held_out = _held_out(config, pupil, way)
    gallery = pupil.gallery(config)
    rules = gallery.rules if gallery is not None else None
    samples = Samples(pupil.decoder, pupil.tokenizer, None, config.out, config.samples, config.sample_tokens, rules)
    events = Events(config.out) if config.tensorboard else None
    with Watcher(steps, events) as watcher, within_memory(config, pupil, way, stream.batch(0)) as again:
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
            settings=plain_settings(config),
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
    """The loss of every whole row of the held-out corpora, and of all rows with pictures."""
    if not config.held_out:
        return None
    sources = _sources(replace(config, data=config.held_out, weights=(), skip_bad=False), pupil, BadRows(pupil.ranks))
    corpora = [source for source in sources if isinstance(source, Source)]
    batches = [source.rows.batch(n) for source in sources if isinstance(source, RowSource) for n in range(source.rows.count(1))]
    if corpora:
        stream = Stream(corpora, config.batch_tokens, config.seed)
        batches += map(stream.batch, range(max(1, sum(source.tokens for source in corpora) // config.batch_tokens)))
    return HeldOut(pupil.decoder, batches, ranks=pupil.ranks, run=way)


def _digest(source: Source | RowSource) -> str:
    if isinstance(source, Source):
        return source.corpus.facts.sha256_tokens
    return digest_of_ids(ids_of(example) for example in source.rows.examples)


def _sources(config: PretrainConfig, pupil: Pupil, bad: BadRows) -> list[Source | RowSource]:
    """The corpora and files of rows, checked against the model."""
    if config.weights and len(config.weights) != len(config.data):
        raise ConfigError(f"weights has {len(config.weights)} numbers for {len(config.data)} sources; give one for each")
    if config.batch_tokens > pupil.decoder.config.max_positions:
        room = pupil.decoder.config.max_positions
        raise ConfigError(f"batch_tokens is {config.batch_tokens:,}, more than the model's {room:,} positions")
    sources = [_row_source(path, config, pupil, bad) if _holds_rows(path) else _corpus(path, pupil) for path in config.data]
    weights = config.weights or tuple(float(source.room(config.batch_tokens)) for source in sources)
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def _holds_rows(path: Path) -> bool:
    """Whether a name in `data` leads to rows, and not to a corpus, whose files are `NAME.tokens`, `NAME.ends` and `NAME.json`."""
    if path.with_suffix(".tokens").is_file():
        return False
    return path.is_dir() or path.suffix in SUFFIXES or any(sign in str(path) for sign in "*?[")


def _corpus(path: Path, pupil: Pupil) -> Source:
    corpus = open_corpus(path)
    if corpus.facts.vocabulary > pupil.decoder.config.vocab_size:
        raise DataError(
            f"{corpus.path}: was made with a vocabulary of {corpus.facts.vocabulary:,} words, the model has "
            f"{pupil.decoder.config.vocab_size:,}; prepare it with this model's tokenizer"
        )
    return Source(corpus.path.name, corpus)


def _row_source(path: Path, config: PretrainConfig, pupil: Pupil, bad: BadRows) -> RowSource:
    """Rows with pictures (texts without pictures may be among them), packed whole."""
    gallery = pupil.gallery(config)
    if gallery is None:
        raise DataError(
            f"{path}: holds rows, and a model that reads text alone learns from a corpus; make one with `ernie pretrain --prepare`"
        )

    def make(record: Record) -> Example:
        if not isinstance(record, Document | Interleaved):
            raise DataError(
                f"{record.where}: is a conversation; pre-training reads texts and rows with pictures (conversations: `ernie sft`)"
            )
        return as_document(record, pupil.tokenizer, gallery)

    on_bad = bad if config.skip_bad else None
    examples = checked_examples(read_records([path], on_bad), make, config.batch_tokens, on_bad, pupil.decoder.config.vocab_size)
    return RowSource(path.name, PackedExamples(examples, config.batch_tokens, config.seed, gallery.pack))
