"""A run: steps from where the last checkpoint stands to the end, one log line each, checkpoints on the way."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ernie45.errors import ConfigError, RunError
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.train.accounting import accounted, memory_by_kind
from ernie45.train.ahead import Ahead
from ernie45.train.checkpoint import Checkpoints, Progress
from ernie45.train.evaluate import Measured
from ernie45.train.examples import Batch, Batches, digest_after, digest_of
from ernie45.train.lock import locked
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.step import StepReport

LOG, PLAN, SETTINGS = "log.jsonl", "plan.json", "settings.json"
MAX_SKIPPED = 5
"""Steps in a row whose gradient may be not finite before the run ends: then it is no outlier, the run has diverged."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is and what it keeps."""

    steps: int
    """Optimiser steps."""
    accumulate: int = 1
    """Batches per step, of all ranks together."""
    save_every: int = 500
    """Steps between checkpoints; one more is written at the end."""
    keep: int = 2
    """Checkpoints kept."""
    eval_every: int = 100
    """Steps between two measurements of the held-out loss, where there is one; one more is made at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every", "keep", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, not {getattr(self, name)}")


B = TypeVar("B", bound=Batch)
C = TypeVar("C", bound=Batch, contravariant=True)


class Learner(Protocol[C]):
    """One optimiser step of some method: language modelling, preferences, ..."""

    optimiser: Optimiser

    def __call__(self, batches: Sequence[C], step: int, rate: float) -> StepReport:
        """Learn from the batches of one step."""
        ...


def train(
    learner: Learner[B],
    model: torch.nn.Module,
    data: Batches[B],
    schedule: ScheduleConfig,
    config: RunConfig,
    folder: Path,
    fingerprint: str,
    *,
    average: MovingAverage | None = None,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_saved: Callable[[Progress], None] = lambda progress: None,
    ranks: Ranks = ALONE,
    peak: float | None = None,
    again: float = 0.0,
    evaluate: Callable[[], Measured] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Progress:
    """Run to the end from the newest checkpoint in `folder`, or from the start. Returns where it stands.

    The batches of a step are shared out among the ranks; which batches a step has does not depend on how many ranks there are. on_report is
    called after each step and on_saved after each checkpoint, on the first rank. peak: operations a second of this rank's device, for MFU;
    again: share of the layers' forward pass that is computed a second time. In one process a run that was killed and resumed gives the
    losses of one that was not, bit for bit. evaluate: measures held-out rows, on all ranks.
    settings: what `settings.json` will say; it and the plan are written when the folder is this run's and its checkpoint fits.
    Raises RunError when another run works in the folder, the checkpoint does not fit, or losses stay not finite, and ConfigError when there
    are more ranks than batches in a step.
    """
    if config.accumulate < ranks.world:
        raise ConfigError(
            f"{ranks.world} ranks share {config.accumulate} batches a step, so some would have none; set accumulate to {ranks.world} or a "
            "multiple (it counts the batches of all ranks together)"
        )
    if ranks.sharded and config.accumulate % ranks.world:
        raise ConfigError(
            f"{ranks.world} ranks that share the weights must run equally many batches, and accumulate is {config.accumulate}; set it to a "
            "multiple, or let every rank have the whole model (--shard none)"
        )
    with _naming_full_disks(folder), ExitStack() as held:
        ranks.once(lambda: held.enter_context(locked(folder)))
        checkpoints = Checkpoints(folder / "checkpoints", fingerprint, config.keep, ranks)
        held.callback(checkpoints.close)
        progress = checkpoints.load_last(model, learner.optimiser, average) or Progress()
        ranks.once(lambda: _record(folder, config, settings))
        write = held.enter_context(_log(folder / LOG, progress.step)) if ranks.is_first else _nowhere
        skipped, first = 0, True
        ahead = Ahead(data, ranks.share(config.accumulate), config.accumulate, config.steps * config.accumulate)
        held.callback(ahead.close)
        peaks = ranks.sums([peak])[0] if peak is not None else None
        while progress.step < config.steps:
            batches = ahead.take(progress.consumed)
            report = learner(batches, progress.step, schedule.at(progress.step, config.steps))
            report = accounted(report, peaks, again, memory_by_kind(model, learner.optimiser, average) if first else None)
            first = False
            progress = _after(progress, batches, config.accumulate, report, ranks)
            if average is not None and not report.skipped:
                average.update(learner.optimiser, report.tokens)
            if evaluate is not None and (progress.step % config.eval_every == 0 or progress.step == config.steps):
                measured = evaluate()
                report = replace(report, held_out_loss=measured.loss, held_out_accuracy=measured.accuracy)
            write(report)
            if ranks.is_first:
                on_report(report)
            skipped = skipped + 1 if report.skipped else 0
            if skipped == MAX_SKIPPED:
                raise RunError(
                    f"the gradient was not finite in {MAX_SKIPPED} steps in a row, up to step {report.step}: the run has diverged; "
                    f"lower the learning rate or look at the data; the last good weights are in {checkpoints.folder}"
                )
            if not skipped and (progress.step % config.save_every == 0 or progress.step == config.steps):
                checkpoints.save(progress, model, learner.optimiser, average, wait=progress.step == config.steps)
                ranks.once(partial(on_saved, progress))
        checkpoints.finish()
    return progress


@contextmanager
def _naming_full_disks(folder: Path) -> Iterator[None]:
    """What the system refuses to write ends the run with a reason, and with what is left of it."""
    try:
        yield
    except OSError as error:
        there = sorted((folder / "checkpoints").glob("step-*"))
        rest = f"the last whole checkpoint is {there[-1]}" if there else "there is no checkpoint yet"
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror or error}; {rest}") from error


def _record(folder: Path, config: RunConfig, settings: Mapping[str, Any] | None) -> None:
    """What the run is, beside its log."""
    (folder / PLAN).write_text(json.dumps(asdict(config)) + "\n", "utf-8")
    if settings is not None:
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _nowhere(report: StepReport) -> None:
    """The log of a rank that writes none."""


def _after(progress: Progress, batches: Sequence[Batch], count: int, report: StepReport, ranks: Ranks) -> Progress:
    """After a step of `count` batches, of which `batches` were this rank's."""
    digests = ranks.in_order([digest_of(batch) for batch in batches], count)
    return Progress(
        step=progress.step + 1,
        consumed=progress.consumed + count,
        digest=digest_after(progress.digest, digests),
        tokens=progress.tokens + report.tokens,
    )


@contextmanager
def _log(path: Path, step: int) -> Iterator[Callable[[StepReport], None]]:
    """Writes one line a step; lines of steps from `step` on belong to a run that was killed after its checkpoint, and go."""
    kept = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line: the kill came while it was written
    path.write_text("".join(line + "\n" for line in kept), "utf-8")
    with path.open("a", encoding="utf-8") as file:

        def write(report: StepReport) -> None:
            file.write(json.dumps(report.as_json()) + "\n")
            file.flush()

        yield write
