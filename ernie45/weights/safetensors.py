"""Safetensors files read in place: one file, or a folder of shards, as a mapping from name to tensor.

A file is mapped copy-on-write, so a tensor is a view of the page cache: nothing is read until it is used, nothing is copied, and
writing into a tensor never reaches the disk. The header is treated as hostile: every length and offset is checked against the real
size of the file before a view is made. Format: 8 bytes little-endian header length, a JSON header, then the data without holes.
Writing is `weights.safetensors_write`.
"""

import json
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.weights.mapping import map_privately

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation. The 6,855 tensors of the 300B model need about one million."""
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pdparams"})

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor, without its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(path: Path) -> "TensorFiles":
    """Open one `.safetensors` file, or a folder with `model.safetensors` or with shards and their index.

    Raises CheckpointError, naming the file, when it is missing, truncated, inconsistent, or a pickle.
    """
    if path.suffix in PICKLE_SUFFIXES:
        _refuse_pickle(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return TensorFiles([_MappedFile(path)])


class TensorFiles:
    """The tensors of one or several mapped files. Views stay valid after `close`: a mapping lives as long as its last view."""

    owned = False

    def __init__(self, files: "list[_MappedFile]", listed: dict[str, str] | None = None) -> None:
        """Join `files`; with `listed` (an index: tensor -> file name) both must agree."""
        self._home: dict[str, _MappedFile] = {}
        for file in files:
            for name in file.entries:
                if name in self._home:
                    raise CheckpointError(f"{file.path}: tensor {name!r} is also in {self._home[name].path.name}; keep one of them")
                if listed is not None and listed.get(name) != file.path.name:
                    said = listed.get(name, "no file at all")
                    raise CheckpointError(
                        f"{file.path}: holds tensor {name!r}, which {INDEX_NAME} says is in {said}; download the folder again"
                    )
                self._home[name] = file
        for name, shard in (listed or {}).items():
            if name not in self._home:
                raise CheckpointError(f"{shard}: tensor {name!r} is listed in {INDEX_NAME} but is not in the file; download it again")
        self.metadata: dict[str, str] = {key: value for file in files for key, value in file.metadata.items()}

    def names(self) -> list[str]:
        """All tensor names, file by file, in the order of their data."""
        return list(self._home)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        """Type, shape and file of a tensor, from the header alone."""
        file = self._home[name]
        entry = file.entries[name]
        return TensorInfo(name, entry.dtype, entry.shape, file.path)

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file (a copy only where the file placed it off its alignment)."""
        return self._home[name].view(name)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages; for one that was copied elsewhere. A later read fetches them again.

        Whatever was written into a view of it is lost.
        """
        self._home[name].release(name)

    def close(self) -> None:
        """Forget the files; tensors already read stay valid."""
        self._home.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class _Entry:
    """One header entry, checked. `begin` and `end` are offsets in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _MappedFile:
    """One file: its checked header and its mapping."""

    def __init__(self, path: Path) -> None:
        if sys.byteorder != "little":
            raise CheckpointError(f"{path}: safetensors files are little-endian and this machine is not; it is not supported")
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header, start = _read_header(path, file.read(8), size, file.read)
                # Copy-on-write: torch wants writable memory, the file must stay as it is.
                self.map = map_privately(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.metadata, self.entries = _check_header(path, header, start, size)

    def view(self, name: str) -> Tensor:
        """The tensor over the mapping."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin % entry.dtype.itemsize == 0:
            return torch.frombuffer(self.map, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)
        raw = torch.frombuffer(self.map, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin)
        return raw.clone().view(entry.dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Drop whole pages inside the tensor; the pages it shares with its neighbours stay."""
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _read_header(path: Path, prefix: bytes, size: int, read: Any) -> tuple[dict[str, Any], int]:
    """The JSON header of a file of `size` bytes and where the data begins. `read(n)` continues after the 8-byte prefix."""
    if len(prefix) < 8:
        _damaged(path, f"it has {size} bytes, too few for a header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        _damaged(path, f"its header claims {length:,} bytes (the limit is {MAX_HEADER:,}); it is not a safetensors file")
    if 8 + length > size:
        _damaged(path, f"its header claims {length:,} bytes and the file has {size:,}; it is truncated")
    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is not JSON ({type(error).__name__})")
    if not isinstance(header, dict):
        _damaged(path, "its header is not a JSON object")
    return header, 8 + length


def _check_header(path: Path, header: dict[str, Any], start: int, size: int) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and entries in the order of their data, which must fill the file from `start` to `size` without hole or overlap."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its __metadata__ is not a map of text to text")
    entries = sorted(((name, _entry(path, name, value, start)) for name, value in header.items()), key=lambda pair: pair[1].begin)
    end = start
    for name, entry in entries:
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else f"leaves {entry.begin - end:,} bytes unused before it"
            _damaged(path, f"tensor {name!r} {what}")
        end = entry.end
        if end > size:
            _damaged(path, f"tensor {name!r} ends at byte {end:,} and the file has {size:,}; it is truncated")
    if end != size:
        _damaged(path, f"{size - end:,} bytes after the last tensor belong to none")
    return metadata, dict(entries)


def _entry(path: Path, name: str, value: Any, start: int) -> _Entry:
    """One header entry, every field checked."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"the entry of tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {dtype!r}, which is not read; allowed: {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(path, f"the shape or the offsets of tensor {name!r} are not natural numbers in order")
    expected, found = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if expected != found:
        _damaged(path, f"tensor {name!r} of type {dtype} and shape {shape} needs {expected:,} bytes and its offsets span {found:,}")
    return _Entry(DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    """True for a list of integers >= 0 (a JSON true is not one)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names must differ: of two tensors with one name, nobody can say which is meant."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        _damaged(path, f"{twice!r} occurs twice in its JSON")
    return result


def _open_folder(folder: Path) -> TensorFiles:
    """The weights of a model folder."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists() and single.exists():
        listed = _read_index(index)
        if set(listed.values()) != {SINGLE_NAME}:
            raise CheckpointError(f"{folder}: has both {SINGLE_NAME} and {INDEX_NAME} for other files; remove the one that is not meant")
        return TensorFiles([_MappedFile(single)], listed)
    if index.exists():
        listed = _read_index(index)
        shards = sorted(set(listed.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(shards)} files named by {INDEX_NAME} are missing, first {missing[0]}; download them"
            )
        return TensorFiles([_MappedFile(folder / shard) for shard in shards], listed)
    if single.exists():
        return TensorFiles([_MappedFile(single)])
    return _open_unnamed(folder)


def _open_unnamed(folder: Path) -> TensorFiles:
    """A folder without the usual names: its one safetensors file, or a refusal that says what is there."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    tensors = [path for path in found if path.suffix == ".safetensors"]
    if len(tensors) == 1 and "-of-" not in tensors[0].name:
        return TensorFiles([_MappedFile(tensors[0])])
    if tensors:
        raise CheckpointError(f"{folder}: holds {len(tensors)} safetensors files but no {INDEX_NAME}; download the index, or name one file")
    for path in found:
        if path.suffix in PICKLE_SUFFIXES:
            _refuse_pickle(path)
    there = ", ".join(path.name for path in found[:8]) or "nothing"
    raise CheckpointError(f"{folder}: no weights: {SINGLE_NAME} or {INDEX_NAME} is expected; there is: {there}")


def _read_index(path: Path) -> dict[str, str]:
    """The map tensor -> file name of an index. File names are plain: an index cannot point outside its folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        _damaged(path, f"it is not JSON ({type(error).__name__})")
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed:
        _damaged(path, "it has no weight_map")
    for name, shard in listed.items():
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {shard!r}; only .safetensors files beside the index are read")
    return listed


def _damaged(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: the file is damaged: {what}; download or copy it again")


def _refuse_pickle(path: Path) -> NoReturn:
    how = (
        "load it with paddle.load in an environment you trust and write it with safetensors.numpy.save_file"
        if path.suffix == ".pdparams"
        else "load it with torch.load(weights_only=True) in an environment you trust and write it with safetensors.torch.save_file"
    )
    raise CheckpointError(f"{path}: {path.suffix} is a pickle, which can run code when opened, and is never read; to convert it, {how}")
