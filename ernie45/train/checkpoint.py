"""Checkpoints: a folder that is there whole or not at all, and that continues a run to the bit.

    RUN/checkpoints/step-00000100/
        model.safetensors   trained weights (`weights/`), selection biases, optimiser state (`optimiser/`), averages (`average/`)
        state.json          progress, a fingerprint of the settings, and the digest of the tensors

It is written beside its place, synced, and renamed: a crash while writing leaves the last good one. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernie45.config import from_mapping
from ernie45.errors import ConfigError, RunError
from ernie45.train.examples import NO_HISTORY
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.weights.safetensors import SINGLE_NAME, open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

STATE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: optimiser steps done, batches consumed (the whole state of the data), and the digest of their ids."""

    step: int = 0
    consumed: int = 0
    digest: str = NO_HISTORY
    tokens: int = 0


class Checkpoints:
    """The checkpoints of one run. `fingerprint` is of the settings that decide what is learned; a checkpoint of others is refused."""

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2) -> None:
        assert keep >= 1, "the last checkpoint is always kept"
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep

    def list(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if (path / STATE).is_file())

    def save(self, progress: Progress, model: nn.Module, optimiser: Optimiser, average: MovingAverage | None) -> Path:
        """Write a checkpoint and remove those beyond the newest `keep`. Raises CheckpointError when the disk has too little room."""
        target = self.folder / f"{_PREFIX}{progress.step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".partial-*"):  # of runs that were killed; the run's lock is ours
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f".partial-{target.name}"
        try:
            (weights,) = save_safetensors(partial, _tensors(model, optimiser, average).items(), shard_bytes=1 << 62)
            body = {"progress": asdict(progress), "settings": self.fingerprint, "sha256": _sha256(weights)}
            _write_synced(partial / STATE, json.dumps(body, indent=2) + "\n")
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old)
        return target

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
                f"{path}: was made with other settings (model, data, losses, optimiser or schedule); continue with the same, or choose "
                "another folder"
            )
        if _sha256(path / SINGLE_NAME) != state.get("sha256"):
            raise RunError(
                f"{path}: {SINGLE_NAME} is not what was written: the disk damaged it; remove this checkpoint to use an older one"
            )
        with open_safetensors(path) as files:
            held = {name: files.read(name) for name in files.names()}
            _fill(model, _under(held, "weights/"), str(path))
            optimiser.load_state(_under(held, "optimiser/"), str(path))
            if average is not None:
                average.load(_under(held, "average/"), str(path))
        try:
            return from_mapping(Progress, state.get("progress", {}), f"{path}: progress")
        except ConfigError as error:
            raise RunError(str(error)) from None


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of plain settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters with a gradient, and selection biases."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name.endswith("selection_bias")}


def _tensors(model: nn.Module, optimiser: Optimiser, average: MovingAverage | None) -> dict[str, Tensor]:
    held = {f"weights/{name}": tensor for name, tensor in _moving(model).items()}
    held |= {f"optimiser/{name}": tensor for name, tensor in optimiser.state().items()}
    return held | {f"average/{name}": tensor for name, tensor in (average.weights if average else {}).items()}


def _under(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}


@torch.no_grad()
def _fill(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    moving = _moving(model)
    if set(moving) != set(weights) or any(moving[name].shape != tensor.shape for name, tensor in weights.items()):
        raise RunError(f"{where}: holds the weights of another model")
    for name, tensor in weights.items():
        moving[name].copy_(tensor)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / STATE}: cannot be read: {error}; remove this checkpoint to use an older one") from None
    if not isinstance(state, dict):
        raise RunError(f"{path / STATE}: is not a table; remove this checkpoint to use an older one")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
