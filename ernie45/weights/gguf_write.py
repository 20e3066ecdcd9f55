"""Writing GGUF files (version 3), one tensor at a time, whole or not at all.

The header lists every tensor before the first byte of data, so a writer takes specs (name, number format, shape) and a callable that makes
each tensor when its turn comes: a model of any size is written with one tensor in memory. The file grows under a hidden name beside its
place and is renamed when it is complete and on the disk.
"""

import errno
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.weights.gguf import DEFAULT_ALIGNMENT, MAGIC
from ernie45.weights.gguf_blocks import BlockType, encode
from ernie45.weights.safetensors_write import check_room

_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11


@dataclass(frozen=True)
class GgufSpec:
    """A tensor to be written. `shape` is in torch order; its last dimension must divide into blocks of `type`."""

    name: str
    type: BlockType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write_gguf(path: Path, metadata: Mapping[str, Any], specs: Sequence[GgufSpec], produce: Callable[[str], Tensor]) -> int:
    """Write `path` and return its size in bytes. `produce(name)` is called once per spec, in order, for a float tensor of that shape.

    Metadata values are stored as llama.cpp reads them: truth, text, whole numbers as uint32 where they fit, fractions as float32, lists
    of one of these (whole numbers as int32). Raises `CheckpointError` when the file exists, the disk has too little room, or a tensor
    holds NaN or infinite numbers; nothing is left behind then.
    """
    assert len({spec.name for spec in specs}) == len(specs), "tensor names must differ"
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another name, or remove it first")
    header = _header(metadata, specs)
    total = len(header) + sum(_padded(spec.size) for spec in specs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, total)
        handle, name = tempfile.mkstemp(prefix=".partial-", suffix=".gguf", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for spec in specs:
                _write_tensor(file, spec, produce(spec.name))
            file.flush()
            os.fsync(file.fileno())
        # a temporary file is private to its maker; a model file has the usual rights
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        reason = "the disk became full" if error.errno == errno.ENOSPC else error.strerror or error
        raise CheckpointError(f"{path} cannot be written: {reason}; nothing was kept") from error
    finally:
        partial.unlink(missing_ok=True)
    return total


def _write_tensor(file: BinaryIO, spec: GgufSpec, tensor: Tensor) -> None:
    assert tuple(tensor.shape) == spec.shape, (spec, tuple(tensor.shape))
    try:
        data = encode(spec.type, tensor.detach())
    except CheckpointError as error:
        raise CheckpointError(f"the tensor '{spec.name}' {error}") from error
    assert data.numel() == spec.size
    file.write(data.numpy().data)
    file.write(bytes(_padded(spec.size) - spec.size))


def _header(metadata: Mapping[str, Any], specs: Sequence[GgufSpec]) -> bytes:
    """Everything before the data, padded to the alignment."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(specs), len(metadata))]
    for key, value in metadata.items():
        kind, data = _value(key, value)
        parts += [_text(key), struct.pack("<I", kind), data]
    offset = 0
    for spec in specs:
        dims = spec.shape[::-1]
        parts += [_text(spec.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, spec.type.code, offset)]
        offset += _padded(spec.size)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> tuple[int, bytes]:
    """Type code and bytes of one metadata value."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        kind, letter = (_UINT32, "I") if 0 <= value < 1 << 32 else (_INT64, "q") if value < 1 << 63 else (_UINT64, "Q")
        return kind, struct.pack("<" + letter, value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _TEXT, _text(value)
    assert isinstance(value, list | tuple), f"metadata '{key}' cannot be a {type(value).__name__}"
    kind, data = _items(key, value)
    return _ARRAY, struct.pack("<IQ", kind, len(value)) + data


def _items(key: str, values: Sequence[Any]) -> tuple[int, bytes]:
    """Type code of the items and their bytes, without the count."""
    if all(isinstance(v, str) for v in values):
        return _TEXT, b"".join(map(_text, values))
    if all(isinstance(v, bool) for v in values):
        return _BOOL, struct.pack(f"<{len(values)}?", *values)
    if all(isinstance(v, int) for v in values):
        return _INT32, struct.pack(f"<{len(values)}i", *values)
    assert all(isinstance(v, float) for v in values), f"metadata '{key}' mixes kinds of items"
    return _FLOAT32, struct.pack(f"<{len(values)}f", *values)
