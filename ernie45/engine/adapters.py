"""Adapters in use: loaded when a request asks for them, bounded in number and bytes, the one unused for longest leaving first.

A version of an adapter is known by its name and the digest of its files. Files that change make a new version: requests that run go on with
the one they began with, and pages of the prefix cache are never shared between versions, since the digest is part of their names.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ernie45.errors import CheckpointError, RequestError
from ernie45.models.adapter_folder import CONFIG, WEIGHTS, AdapterFolder
from ernie45.models.adapter_layers import read_adapter_layers
from ernie45.models.text import Decoder
from ernie45.nn.row_adapters import AdapterLayers, StepAdapters, beside
from ernie45.quant.model import unfuse

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A version of an adapter."""

    stamp: _Stamp
    layers: AdapterLayers
    size: int


class Adapters:
    """hold / drop around a request's life; `network` chooses what computes a step."""

    def __init__(self, decoder: Decoder, folder: AdapterFolder, most: int, most_bytes: int) -> None:
        """most, most_bytes: how many versions, and how many bytes of them, are in memory at the same time."""
        self._decoder, self._folder = decoder, folder
        self._most, self._most_bytes = most, most_bytes
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # by version; used last stands last
        self._latest: dict[str, str] = {}  # name -> version
        self._held: dict[str, str] = {}  # request -> version
        self._rows = StepAdapters()
        self._beside: Decoder | None = None

    @property
    def loaded(self) -> tuple[str, ...]:
        """The versions in memory, the one used last standing last."""
        return tuple(self._loaded)

    def hold(self, request_id: str, name: str) -> str:
        """Takes an adapter for a request, loading it if need be, and returns its version. Raises `RequestError`."""
        folder = self._folder.find(name)
        try:
            version = self._open(name, folder)
        except CheckpointError as error:  # clients learn what is wrong, and not where this server keeps its files
            text = str(error).replace(f"{folder}", name)
            raise RequestError(f"the adapter '{name}' cannot be used: {text}", "model") from None
        self._loaded.move_to_end(version)
        self._held[request_id] = version
        return version

    def drop(self, request_id: str) -> None:
        """The request is over, or never had an adapter."""
        self._held.pop(request_id, None)

    def network(self, request_ids: Sequence[str], spans: Sequence[tuple[int, int]], vision_T: Tensor | None = None) -> Decoder:
        """What computes a step whose requests have these rows, first and end each: the bare network where none has an adapter.

        `vision` says which rows go to the vision experts, bool [T]; None: no row.
        """
        rows: dict[str, list[int]] = {}
        for request_id, (first, end) in zip(request_ids, spans, strict=True):
            if (version := self._held.get(request_id)) is not None:
                rows.setdefault(version, []).extend(range(first, end))
        if not rows:
            return self._decoder
        if self._beside is None:
            made = beside(self._decoder, self._rows, unfuse)
            assert isinstance(made, Decoder)
            self._beside = made
        self._rows.tell([(self._loaded[version].layers, numbers) for version, numbers in rows.items()], spans[-1][1], vision_T)
        return self._beside

    def _open(self, name: str, folder: Path) -> str:
        stamp = _stamp(folder)
        latest = self._latest.get(name)
        if latest is not None and latest in self._loaded and self._loaded[latest].stamp == stamp:
            return latest
        if stamp[1][1] > 4 * self._most_bytes:
            raise CheckpointError(f"{folder / WEIGHTS}: has {stamp[1][1]:,} bytes; all adapters together have {self._most_bytes:,}")
        version = f"{name}@{_digest(folder)}"
        if version in self._loaded:  # only the times of its files are new
            self._loaded[version] = replace(self._loaded[version], stamp=stamp)
        else:
            self._make_room(1, 0)
            layers, size = read_adapter_layers(folder, self._decoder.model_config, self._decoder.dtype, self._most_bytes)
            if _stamp(folder) != stamp:
                raise CheckpointError(f"{folder}: changed while it was read; ask again")
            self._make_room(1, size)
            self._loaded[version] = _Loaded(stamp, layers, size)
        self._latest[name] = version
        return version

    def _make_room(self, count: int, size: int) -> None:
        """Lets versions go that no request holds, the one unused for longest first. Raises `RequestError` when that is not enough."""
        used = set(self._held.values())
        for version in [version for version in self._loaded if version not in used]:
            if len(self._loaded) + count <= self._most and self._size + size <= self._most_bytes:
                return
            del self._loaded[version]
            self._latest = {name: latest for name, latest in self._latest.items() if latest != version}
        if len(self._loaded) + count > self._most or self._size + size > self._most_bytes:
            raise RequestError(
                f"{len(self._loaded)} adapters of {self._size:,} bytes are in use; at most {self._most} of {self._most_bytes:,} bytes "
                "can be at the same time; ask again when some have ended",
                "model",
            )

    @property
    def _size(self) -> int:
        return sum(loaded.size for loaded in self._loaded.values())


def _stamp(folder: Path) -> _Stamp:
    """What changes when the files do."""
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}; adapters are read from safetensors only") from None
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
