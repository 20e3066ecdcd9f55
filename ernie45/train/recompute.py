"""What a forward pass keeps for its backward: everything, each layer's input, or what is dearest to compute again; in memory or on disk.

A layer has two parts, attention and feed-forward; each block of a vision tower is one more, and so is the resampler. `measure` finds in one
pass what each part keeps and how long it takes; `choose` gives up first what frees most bytes for a second of computing, until the rest
fits; `computed_again` makes it so. All three ways give the same gradients to the bit, since the second computation is the first one over
again.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ernie45.models.text import Decoder

PARTS = ("attn", "ffn")
LEAST_BYTES = 1 << 16
"""Smaller tensors stay in memory: a file costs more than they do."""


@dataclass(frozen=True)
class Part:
    """One part of one layer: bytes that it alone keeps for backward, and seconds that its forward pass takes."""

    layer: int
    name: str
    bytes: int
    seconds: float


def measure(decoder: Decoder, run: Callable[[], object]) -> list[Part]:
    """Every part of the decoder's layers during `run`, which is one forward pass with gradient."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[tuple[int, str], dict[int, int]] = {}
    seconds: dict[tuple[int, str], float] = {}

    def watched(key: tuple[int, str], forward: Callable[..., Tensor], x_TD: Tensor, *others: Any) -> Tensor:
        own = kept.setdefault(key, {})

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # its input is kept whether or not the part is computed again
            if storage.data_ptr() not in weights and storage.data_ptr() != x_TD.untyped_storage().data_ptr():
                own[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = time.perf_counter()
        with saved_tensors_hooks(note, lambda tensor: tensor):
            result = forward(x_TD, *others)
        seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
        return result

    with ExitStack() as stack:
        for (layer, name), module in _parts(decoder).items():
            stack.enter_context(_forward_of(module, partial(watched, (layer, name), module.forward)))
        run()
    return [Part(layer, name, sum(own.values()), seconds[layer, name]) for (layer, name), own in kept.items()]


def choose(parts: Sequence[Part], room: int) -> list[Part]:
    """The parts to compute again so that the others keep at most `room` bytes: those first that free most bytes for a second."""
    again, kept = [], sum(part.bytes for part in parts)
    for part in sorted(parts, key=lambda part: -part.bytes / max(part.seconds, 1e-9)):
        if kept <= room:
            break
        again.append(part)
        kept -= part.bytes
    return again


@contextmanager
def computed_again(decoder: Decoder, parts: Sequence[Part]) -> Iterator[None]:
    """While it lasts, these parts keep their input alone and are computed again in backward."""
    modules = _parts(decoder)
    with ExitStack() as stack:
        for part in parts:
            module = modules[part.layer, part.name]
            # nothing in a layer is random, so no random state needs to be put back
            again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(_forward_of(module, again))
        yield


class _Place(NamedTuple):
    """Where a tensor lies in the file."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


class Offload:
    """Keeps what a forward pass saves for its backward in a file that nobody sees, which goes after the backward.

    Weights are left where they are. `written` counts bytes.
    """

    def __init__(self, decoder: nn.Module, folder: Path) -> None:
        self.decoder, self.folder, self.written = decoder, folder, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around forward and backward of one micro-batch."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.decoder.parameters()}
        with tempfile.TemporaryFile(dir=self.folder) as file:

            def put(tensor: Tensor) -> Tensor | _Place:
                if tensor.nbytes < LEAST_BYTES or tensor.untyped_storage().data_ptr() in weights:
                    return tensor
                start = file.seek(0, os.SEEK_END)
                file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                self.written += tensor.nbytes
                return _Place(start, tensor.nbytes, tensor.dtype, tensor.shape)

            def get(held: Tensor | _Place) -> Tensor:
                if isinstance(held, Tensor):
                    return held
                file.seek(held.start)
                data = np.fromfile(file, dtype=np.uint8, count=held.nbytes)
                return torch.from_numpy(data).view(held.dtype).view(held.shape)

            with saved_tensors_hooks(put, get):
                yield


def filed(tensor: Tensor, folder: Path) -> Tensor:
    """A copy of a tensor whose memory is a file that nobody sees: the system may take its pages to disk when memory is short."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(max(1, tensor.nbytes))
        held = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return held.view(tensor.shape).copy_(tensor.detach())


def _parts(decoder: Decoder) -> dict[tuple[int, str], nn.Module]:
    parts = {(layer, name): getattr(block, name) for layer, block in enumerate(decoder.layers) for name in PARTS}
    if decoder.sight is not None:
        parts |= {(number, "tower"): block for number, block in enumerate(decoder.sight.tower.blocks)}
        parts[0, "resampler"] = decoder.sight.resampler
    return parts


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the module run `forward` instead of its own; names of parameters and hooks stay as they are."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
