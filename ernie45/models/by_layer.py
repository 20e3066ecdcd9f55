"""A checkpoint one layer at a time: work on a model that would not fit into memory whole.

Only the parts asked for are read, and nothing of them is kept here. Letters: T tokens, V vocabulary, D width.
"""

import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ernie45.errors import CheckpointError
from ernie45.models.load import OpenModel
from ernie45.models.text import Decoder
from ernie45.nn.block import Block
from ernie45.weights.stream import load_pieces

M = TypeVar("M", bound=nn.Module)


class LayeredModel:
    """The parts of an opened checkpoint in float32, read when asked for. The files stay mapped until `close`."""

    def __init__(self, opened: OpenModel) -> None:
        """Raises CheckpointError when the files do not make the model."""
        if not opened.plan.complete:
            raise CheckpointError(opened.complaint())
        self._opened = opened
        with torch.device("meta"):
            self._empty = Decoder(opened.config)
        self.config = opened.config

    @property
    def skeleton(self) -> Decoder:
        """A decoder of the model's shape without weights (on the meta device), newly made."""
        return copy.deepcopy(self._empty)

    def block(self, layer: int) -> Block:
        """Layer `layer` with its weights."""
        return self.part(f"layers.{layer}", copy.deepcopy(self._empty.layers[layer]))

    def part(self, name: str, module: M) -> M:
        """Fill `module`, the empty module called `name` in the decoder, from the files."""
        state = self.tensors(f"{name}.")
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items()}, assign=True)
        return module.eval().requires_grad_(False)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Parameters whose names begin with `prefix`, by name. Raises CheckpointError for NaN or infinite weights."""
        wanted = {name: tuple(value.shape) for name, value in self._empty.state_dict().items() if name.startswith(prefix)}
        plan = replace(self._opened.plan, pieces=tuple(piece for piece in self._opened.plan.pieces if piece.ours in wanted))
        return load_pieces(plan, self._opened.files, wanted, lambda name: torch.float32)

    def close(self) -> None:
        """Unmap the files."""
        self._opened.files.close()
