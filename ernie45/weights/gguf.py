"""Reading GGUF files (versions 2 and 3, little-endian), which may come from anyone.

A file is: magic, version, counts, key-value metadata, one record per tensor (name, dimensions, type, offset), padding, tensor data. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing in a file is believed before it is checked against the file's own
length: counts and lengths are compared with the bytes that are left before anything is allocated, the header may take `HEADER_LIMIT` bytes,
and every tensor must lie whole, aligned and alone inside the data section. A file that breaks a rule raises `CheckpointError`, which says
what and where.

Tensor data is mapped, not read: `raw` is a view, `read` and `read_into` convert piece by piece.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import CheckpointError, did_you_mean
from ernie45.weights.gguf_blocks import BLOCK_TYPES, READABLE, BlockType, decode_into
from ernie45.weights.mapping import map_privately

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Metadata and tensor records together. The largest published vocabularies take about 15 MB; a value of Python takes at most ten times its
# bytes in the file, so this also bounds the memory that a hostile header can take.
HEADER_LIMIT = 64 << 20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
_MAX_NESTING = 4

# Metadata value types: code -> letter of `struct`. Text and arrays are read apart.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch order (slowest first), the file's reversed; `start` counts from byte 0 of `file`."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """What `read` gives: every number format becomes float32."""
        return torch.float32


class GgufFile:
    """An open GGUF file: `metadata` as plain Python values, tensors by name. Views stay valid after `close`: they hold the mapping."""

    owned = True

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: dict[str, GgufTensor], view: mmap.mmap) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self._view: mmap.mmap | None = view

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._tensors)

    def info(self, name: str) -> GgufTensor:
        """Shape, type and place of a tensor. Raises `CheckpointError` when there is none of that name."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor '{name}'{did_you_mean(name, self._tensors)}")
        return self._tensors[name]

    def type_of(self, name: str) -> str:
        """The number format of a tensor, such as "Q4_K"."""
        return self.info(name).type.name

    def raw(self, name: str) -> Tensor:
        """The stored bytes, uint8 [bytes]: a view of the mapped file, private to this process."""
        tensor = self.info(name)
        assert self._view is not None, "the file is closed"
        return torch.frombuffer(self._view, dtype=torch.uint8, count=tensor.size, offset=tensor.start)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor as `dtype` (a float type), in torch's shape. Raises `CheckpointError` for a format that cannot be read."""
        self._readable(name)
        return self.read_into(name, torch.empty(self.info(name).shape, dtype=dtype))

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Convert the tensor into `out` (contiguous, any float type, as many numbers) without a second copy, and return it.

        Raises `CheckpointError` for a format that cannot be read.
        """
        tensor = self._readable(name)
        decode_into(tensor.type, self.raw(name), out)
        return out

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages, for one that was converted and is not needed again; a later read fetches them anew."""
        tensor = self.info(name)
        begin = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.start + tensor.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._view is not None and end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._view.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Let go of the mapping; it ends with the last view."""
        self._view = None

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _readable(self, name: str) -> GgufTensor:
        tensor = self.info(name)
        if tensor.type.decode is None:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' is stored as {tensor.type.name}, which is not read here; supported: {', '.join(READABLE)}. "
                "Take the same model in one of these formats."
            )
        return tensor


def open_gguf(path: Path) -> GgufFile:
    """Map `path` and check its whole header. Raises `CheckpointError` when it is missing, damaged, hostile or of another version."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path} has {size} bytes; a GGUF file has at least 24")
            view = map_privately(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
    metadata, tensors = _Header(path, view, size).parse()
    return GgufFile(path, metadata, tensors, view)


class _Header:
    """A cursor over the header that never leaves it."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self.path = path
        self.file_size = size
        self.view = view
        self.limit = min(size, HEADER_LIMIT)
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Metadata and tensor records. Raises `CheckpointError` at the first broken rule."""
        self._check_start()
        num_tensors, num_values = self._number("Q"), self._number("Q")
        # a value takes at least its key's length, its type and one byte; a tensor at least 24 bytes
        self._check_count("metadata values", num_values, 13)
        metadata: dict[str, Any] = {}
        for index in range(num_values):
            key = self._text(f"key {index}")
            if key in metadata:
                raise self._error(f"the metadata key '{key}' appears twice")
            metadata[key] = self._value(self._number("I"), key, 0)
        self._check_count("tensors", num_tensors, 24)
        records = [self._record(index) for index in range(num_tensors)]
        alignment = self._alignment(metadata)
        return metadata, self._place(records, alignment)

    def _check_start(self) -> None:
        magic = bytes(self.view[:4])
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
        self.at = 4
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            reason = "it is big-endian" if swapped in VERSIONS else f"it is of GGUF version {version}"
            raise CheckpointError(
                f"{self.path} cannot be read: {reason}; supported: little-endian versions {' and '.join(map(str, VERSIONS))}"
            )

    def _error(self, text: str, at: int | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or hostile: {text} (byte {self.at if at is None else at})")

    def _take(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they begin."""
        start = self.at
        if count > self.limit - start:
            end = "the file ends" if self.limit == self.file_size else f"the header may end (limit {HEADER_LIMIT >> 20} MB)"
            raise self._error(f"{what} would take {count} bytes, but {end} after {self.limit - start}")
        self.at += count
        return start

    def _check_count(self, what: str, count: int, least: int) -> None:
        if count * least > self.limit - self.at:
            raise self._error(f"it announces {count} {what}, more than the remaining {self.limit - self.at} bytes can hold")

    def _number(self, letter: str) -> Any:
        form = struct.Struct("<" + letter)
        return form.unpack_from(self.view, self._take(form.size, "a number"))[0]

    def _text(self, what: str) -> str:
        length = self._number("Q")
        start = self._take(length, f"the text of {what}")
        try:
            return self.view[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"the text of {what} is not UTF-8", start) from error

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text(f"'{key}'")
        if kind == _ARRAY:
            return self._array(key, depth)
        raise self._error(f"'{key}' has the unknown value type {kind}", self.at - 4)

    def _array(self, key: str, depth: int) -> list[Any]:
        if depth >= _MAX_NESTING:
            raise self._error(f"'{key}' nests arrays more than {_MAX_NESTING} deep")
        kind, count = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            letter = _NUMBERS[kind]
            size = struct.calcsize("<" + letter)
            start = self._take(count * size, f"the array '{key}' of {count} numbers")
            return list(struct.unpack_from(f"<{count}{letter}", self.view, start))
        # a text takes at least its length, an array its type and its count
        self._check_count(f"items of '{key}'", count, 8 if kind == _TEXT else 12)
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _record(self, index: int) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._text(f"the name of tensor {index}")
        num_dims = self._number("I")
        if num_dims > MAX_DIMENSIONS:
            raise self._error(f"tensor '{name}' has {num_dims} dimensions; at most {MAX_DIMENSIONS} exist")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        if 0 in shape:
            raise self._error(f"tensor '{name}' has the empty shape {list(shape)}")
        code = self._number("I")
        kind = BLOCK_TYPES.get(code)
        if kind is None:
            raise self._error(f"tensor '{name}' has the unknown type number {code}; supported: {', '.join(READABLE)}", self.at - 4)
        if (shape[-1] if shape else 1) % kind.values:
            raise self._error(
                f"tensor '{name}' has rows of {shape[-1] if shape else 1} numbers, no multiple of {kind.name}'s {kind.values}"
            )
        return name, shape, kind, self._number("Q")

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._error(f"general.alignment is {value!r}; it must be a power of two from 8 to {MAX_ALIGNMENT}")
        return value

    def _place(self, records: list[tuple[str, tuple[int, ...], BlockType, int]], alignment: int) -> dict[str, GgufTensor]:
        """Turn offsets into places in the file, and check that each is whole, aligned and shared with no other."""
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in records:
            numbers = 1
            for dimension in shape:
                numbers *= dimension
            size = numbers // kind.values * kind.size
            if name in tensors:
                raise self._error(f"tensor '{name}' appears twice")
            if offset % alignment:
                raise self._error(f"tensor '{name}' begins at offset {offset}, no multiple of the alignment {alignment}")
            if base + offset + size > self.file_size:
                raise self._error(
                    f"tensor '{name}' of shape {list(shape)} ({kind.name}, {size} bytes) ends at byte {base + offset + size}, "
                    f"but the file has {self.file_size}; was the download cut short?"
                )
            tensors[name] = GgufTensor(name, kind, shape, self.path, base + offset, size)
        end, before = base, ""
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            if tensor.start < end:
                raise self._error(f"tensors '{before}' and '{tensor.name}' overlap", tensor.start)
            end, before = tensor.start + tensor.size, tensor.name
        return tensors
