"""Checkpoints: a folder that is there whole or not at all, and that continues a run to the bit.

    RUN/checkpoints/step-00000100/
        rank-0/model.safetensors, rank-1/...   trained weights (`weights/`), selection biases, optimiser state (`optimiser/`), averages
                                               (`average/`), each tensor once, in parts where ranks hold parts
        state.json                             progress, a fingerprint of the settings, where every part lies, and all digests

It is written beside its place while learning goes on, synced, and renamed by the first rank when all ranks have written: a crash while
writing leaves the last good one. Any number of ranks reads what any other number wrote. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ernie45.config import from_mapping
from ernie45.errors import CheckpointError, ConfigError, ErnieError, RunError
from ernie45.machine import available_memory
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import own_bytes
from ernie45.train.checkpoint_files import PartsReader, PartsWriter, Table, sha256_of
from ernie45.train.examples import NO_HISTORY
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.weights.safetensors_write import check_room

STATE = "state.json"
_PREFIX = "step-"
_ROOMY = 0.5
"""Share of the free memory that the copy of a state may take which is written in the background; beyond it learning waits instead."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: optimiser steps done, batches consumed (the whole state of the data), and the digest of their ids."""

    step: int = 0
    consumed: int = 0
    digest: str = NO_HISTORY
    tokens: int = 0


class Checkpoints:
    """The checkpoints of one run. `fingerprint` is of the settings that decide what is learned; a checkpoint of others is refused.

    All ranks call the same methods in the same order.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2, ranks: Ranks = ALONE) -> None:
        assert keep >= 1, "the last checkpoint is always kept"
        self.folder, self.fingerprint, self.keep, self.ranks = folder, fingerprint, keep, ranks
        self._group = ranks.new_group()  # a channel of its own, since ranks meet about a checkpoint while they meet about gradients
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def list(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if (path / STATE).is_file())

    def save(
        self, progress: Progress, model: nn.Module, optimiser: Optimiser, average: MovingAverage | None, *, wait: bool = False
    ) -> None:
        """Copy the state and write it while learning goes on; with `wait`, or with too little memory for a copy, write it here and now.

        Checkpoints beyond the newest `keep` go when it is whole. Raises CheckpointError when the disk has too little room, now or, for
        one that is written in the background, at the next call.
        """
        self.finish()
        tensors = _tensors(model, optimiser, average)
        partial = self.folder / f".partial-{_PREFIX}{progress.step:08d}"
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with self._naming_the_last():
            self.ranks.once(lambda: self._begin(partial, size))
        if wait or not self._roomy(tensors):
            self._write(partial, progress, tensors)
        else:
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            self._pending = self._thread.submit(self._write, partial, progress, copies)

    def finish(self) -> None:
        """Wait for what is being written. Raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being written, whatever becomes of it; nothing can be saved afterwards."""
        self._thread.shutdown(wait=True)

    def load_last(self, model: nn.Module, optimiser: Optimiser, average: MovingAverage | None) -> Progress | None:
        """Put the newest checkpoint into model, optimiser and average; None when there is none.

        Raises RunError when it is damaged or of other settings.
        """
        there = self.list()
        if not there:
            return None
        path = there[-1]
        state = _read_state(path)
        if state.get("settings") != self.fingerprint:
            raise RunError(
                f"{path}: was made with other settings (model, its weights, data, losses, optimiser or schedule), or by an older ernie45; "
                "continue with the same, or choose another folder"
            )
        self._verify(path, state["sha256"])
        table: Table = state["tensors"]
        held = {f"weights/{name}": tensor for name, tensor in _moving(model).items()}
        held |= {f"average/{name}": tensor for name, tensor in (average.weights if average else {}).items()}
        if {name for name in table if not name.startswith("optimiser/")} != set(held):
            raise RunError(f"{path}: holds the weights of another model")
        keys = [name.removeprefix("optimiser/") for name in table if name.startswith("optimiser/")]
        blank = optimiser.blank_state(keys, str(path))
        held |= {f"optimiser/{key}": tensor for key, tensor in blank.items()}
        for name, tensor in held.items():
            if list(tensor.shape) != table[name]["shape"]:
                raise RunError(f"{path}: holds the weights of another model: {name} has another shape there")
        with torch.no_grad(), _one_process_is_meant():
            dcp.load(dict(held), storage_reader=PartsReader(path, table), process_group=self._group, no_dist=self.ranks.world == 1)
        optimiser.load_state(blank, str(path))
        try:
            return from_mapping(Progress, state.get("progress", {}), f"{path}: progress")
        except ConfigError as error:
            raise RunError(str(error)) from None

    def _begin(self, partial: Path, size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".partial-*"):  # of runs that were killed; the run's lock is ours
            shutil.rmtree(left, ignore_errors=True)
        check_room(self.folder, size)
        partial.mkdir()

    def _roomy(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether every rank has the memory for a copy."""
        tight = sum(map(own_bytes, tensors.values())) > _ROOMY * available_memory()
        return not self.ranks.sums([float(tight)])[0]

    def _write(self, partial: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
        target = partial.with_name(partial.name.removeprefix(".partial-"))

        def commit(table: Table, digests: Mapping[str, str]) -> None:
            body = {"progress": asdict(progress), "settings": self.fingerprint, "sha256": dict(digests), "tensors": dict(table)}
            _write_synced(partial / STATE, json.dumps(body | {"this": fingerprint(body)}, indent=1) + "\n")
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(self.folder)
            for old in self.list()[: -self.keep]:
                shutil.rmtree(old)

        try:
            with self._naming_the_last(), _one_process_is_meant():
                dcp.save(tensors, storage_writer=PartsWriter(partial, commit), process_group=self._group, no_dist=self.ranks.world == 1)
        finally:
            if self.ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _naming_the_last(self) -> Iterator[None]:
        """Errors of writing say what is left. torch wraps the errors of all ranks in one that is no Exception; the cause is taken out."""
        try:
            yield
            return
        except dcp.CheckpointException as wrapped:
            causes = [cause for cause, _ in wrapped.failures.values()]
            error = next((cause for cause in causes if isinstance(cause, ErnieError | OSError)), causes[0])
        except (CheckpointError, OSError) as raised:
            error = raised
        if not isinstance(error, ErnieError | OSError):
            raise error
        there = self.list()
        rest = f"the last whole checkpoint is {there[-1]}" if there else "there is no earlier checkpoint"
        raise CheckpointError(f"a checkpoint could not be written: {error}; {rest}") from error

    def _verify(self, path: Path, digests: Mapping[str, str]) -> None:
        """Each rank reads its share of the files."""
        files = sorted(digests)
        bad = [files[n] for n in self.ranks.share(len(files)) if not _is(path / files[n], digests[files[n]])]
        if self.ranks.sums([len(bad)])[0]:
            name = bad[0] if bad else "a file that another rank read"
            raise RunError(f"{path}: {name} is not what was written: the disk damaged it; remove this checkpoint to use an older one")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of plain settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """torch warns when one process saves without the others; here that is on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


_MEASURED = ("selection_bias", ".input_scale", ".passes")


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with a gradient, and what is measured on the way."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name.endswith(_MEASURED)}


def _tensors(model: nn.Module, optimiser: Optimiser, average: MovingAverage | None) -> dict[str, Tensor]:
    held = {f"weights/{name}": tensor for name, tensor in _moving(model).items()}
    held |= {f"optimiser/{name}": tensor for name, tensor in optimiser.state().items()}
    return held | {f"average/{name}": tensor for name, tensor in (average.weights if average else {}).items()}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / STATE}: cannot be read: {error}; remove this checkpoint to use an older one") from None
    if not isinstance(state, dict):
        raise RunError(f"{path / STATE}: is not a table; remove this checkpoint to use an older one")
    if state.pop("this", None) != fingerprint(state):
        raise RunError(f"{path / STATE}: is not what was written, or is of another version; remove this checkpoint to use an older one")
    return state


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The rename itself must survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
