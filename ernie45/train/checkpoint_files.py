"""The tensors of a checkpoint as safetensors files, one a rank, for torch.distributed.checkpoint; no pickle is written or read.

torch plans: who writes which part of which tensor, and from which parts a tensor of another cut is read. Here the parts become files
(`rank-0/model.safetensors`, ...) and a table of plain data that says where each part of each tensor lies:

    {"weights/norm.weight": {"dtype": "float32", "shape": [64], "parts": [{"at": [0], "shape": [32], "file": ..., "key": ...}, ...]}}
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import TensorSpec, write_safetensors

Table = Mapping[str, Mapping[str, Any]]


class PartsWriter(StorageWriter):
    """Writes this rank's parts below `folder`; when all ranks have, the first one calls `commit(table, digests of the files)`."""

    def __init__(self, folder: Path, commit: Callable[[Table, Mapping[str, str]], None]) -> None:
        self.folder, self.commit = folder, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder exists already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As torch planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """A file for each rank."""
        return [replace(plan, storage_data=f"rank-{rank}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the file of this rank, and take its digest."""
        written: Future[list[WriteResult]] = Future()
        items = {_key(item): item for item in plan.items}
        assert len(items) == len(plan.items), "two parts of one tensor begin at one place"
        if not items:
            written.set_result([])
            return written
        specs = [_spec(key, item) for key, item in items.items()]
        (path,) = write_safetensors(self.folder / plan.storage_data, specs, lambda key: _data(planner, items[key]), shard_bytes=1 << 62)
        place = {"file": str(path.relative_to(self.folder)), "sha256": sha256_of(path)}
        written.set_result(
            [WriteResult(item.index, spec.nbytes, place | {"key": key}) for (key, item), spec in zip(items.items(), specs, strict=True)]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hand the table to `commit`."""
        stored = {result.index: result.storage_data for rank in results for result in rank}
        table = {}
        for name, facts in metadata.state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata), "a checkpoint holds tensors alone"
            parts = []
            for chunk in facts.chunks:
                place = stored[MetadataIndex(name, chunk.offsets)]
                parts.append({"at": list(chunk.offsets), "shape": list(chunk.sizes), "file": place["file"], "key": place["key"]})
            table[name] = {"dtype": str(facts.properties.dtype).removeprefix("torch."), "shape": list(facts.size), "parts": parts}
        self.commit(table, {place["file"]: place["sha256"] for place in stored.values()})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A writer is made for its folder; torch does not choose one by name."""
        return False


class PartsReader(StorageReader):
    """Reads what a table says, whatever number of ranks wrote it."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder, self.table = folder, table
        self._places: Mapping[MetadataIndex, Mapping[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table as torch has it."""
        held: dict[str, STORAGE_TYPES] = {}
        for name, entry in self.table.items():
            chunks = [ChunkStorageMetadata(torch.Size(part["at"]), torch.Size(part["shape"])) for part in entry["parts"]]
            held[name] = TensorStorageMetadata(TensorProperties(dtype=getattr(torch, entry["dtype"])), torch.Size(entry["shape"]), chunks)
        places = {MetadataIndex(name, torch.Size(part["at"])): part for name, entry in self.table.items() for part in entry["parts"]}
        return Metadata(state_dict_metadata=held, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where the parts lie."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As torch planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As torch planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each asked-for piece of a part to its place."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._places[item.storage_index]["file"], []).append(item)
        for file, items in by_file.items():
            with open_safetensors(self.folder / file) as files:
                for item in items:
                    piece = files.read(self._places[item.storage_index]["key"])
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        piece = piece.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A reader is made for its folder; torch does not choose one by name."""
        return False


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(item: WriteItem) -> str:
    """Name of a part in its file: the tensor's, and where the part begins unless that is the beginning."""
    offsets: Sequence[int] = item.index.offset or ()
    return item.index.fqn + ("@" + ",".join(map(str, offsets)) if any(offsets) else "")


def _spec(key: str, item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None, "a checkpoint holds tensors alone"
    return TensorSpec(key, item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))


def _data(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor), "a checkpoint holds tensors alone"
    return data.detach().cpu()
