"""Safetensors files written one tensor at a time, whole or not at all.

The header needs every shape first, so a writer takes specs (name, type, shape) and a callable that makes each tensor when its turn
comes: a model of any size is written with one tensor in memory. Files grow in a hidden folder beside their place and are moved there
when all are complete, the index last.
"""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.weights.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 5_000_000_000
"""Largest shard by default, as published checkpoints have it."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `model.safetensors`, or numbered shards and their index when it would pass `shard_bytes`; returns the weight files.

    `produce(name)` is called once per spec, in order, and must give that type and shape. Raises CheckpointError when the folder
    holds weights already or the disk has too little room; nothing is left behind then.
    """
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names), "tensor names must differ"
    assert "__metadata__" not in names, "a reserved name"
    shards = _split(specs, shard_bytes)
    headers = [_header(shard, metadata or {"format": "pt"}) for shard in shards]
    total = sum(spec.nbytes for spec in specs)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_weights(folder)
    check_room(folder, total + sum(map(len, headers)))
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        files = (
            [SINGLE_NAME] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        )
        for file, shard, header in zip(files, shards, headers, strict=True):
            _write_file(partial / file, header, shard, produce)
        moved = list(files)
        if len(shards) > 1:
            listed = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            moved.append(INDEX_NAME)
        for file in moved:
            (partial / file).replace(folder / file)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"{folder}: the disk became full while writing; nothing was kept") from error
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / file for file in files]


def save_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """`write_safetensors` for tensors that exist already."""
    held = dict(tensors)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()]
    return write_safetensors(folder, specs, held.__getitem__, metadata=metadata, shard_bytes=shard_bytes)


def write_in_parts(folder: Path, parts: Iterable[Mapping[str, Tensor]], count: int) -> int:
    """Write one numbered shard for each of `count` parts, as they come, and the index last; returns the bytes of all tensors.

    One part is in memory at a time. For a folder that is not in its place yet: what is there when the disk refuses (`OSError`) stays.
    """
    listed: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(folder / name, _header(specs, {"format": "pt"}), specs, tensors.__getitem__)
        listed |= dict.fromkeys(tensors, name)
        total += sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def check_room(folder: Path, needed: int) -> None:
    """Raise CheckpointError, with both numbers, unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed:,} bytes are to be written and the disk has {free:,} free; free some, or choose another disk"
        )


def _refuse_weights(folder: Path) -> None:
    """Old and new shards in one folder would be mixed by the next reader."""
    there = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == INDEX_NAME)
    if there:
        raise CheckpointError(f"{folder}: holds weights already ({there[0]}); choose another folder, or remove them first")


def _split(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive groups of at most `shard_bytes`, a single larger tensor in a group of its own; at least one group."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    return shards


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with blanks so that the data begins at a multiple of eight.

    Wider types should come first, so that each tensor is aligned; `_aligned` orders them.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in _aligned(specs):
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _aligned(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Wide element types first (a stable order): then every tensor starts at a multiple of its element size."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def _write_file(path: Path, header: bytes, specs: Sequence[TensorSpec], produce: Callable[[str], Tensor]) -> None:
    """One complete file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(header)
        for spec in _aligned(specs):
            tensor = produce(spec.name)
            assert tensor.dtype == spec.dtype, (spec, tensor.dtype)
            assert tuple(tensor.shape) == spec.shape, (spec, tuple(tensor.shape))
            if tensor.numel():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
