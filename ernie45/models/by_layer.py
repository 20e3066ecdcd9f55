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
        self.opened = opened
        with torch.device("meta"):
            self._empty = Decoder(opened.config, opened.vision)
        self.config = opened.config

    @property
    def num_layers(self) -> int:
        """Layers of the trunk."""
        return self.config.num_layers

    @property
    def frequencies(self) -> Tensor:
        """Rotary frequencies, float32 [P]."""
        return self._empty.frequencies_P

    @property
    def axes(self) -> Tensor:
        """Which of three positions each frequency turns with, int64 [P]."""
        return self._empty.axes_P

    def empty_block(self, layer: int) -> Block:
        """Layer `layer` without weights (on the meta device)."""
        block = copy.deepcopy(self._empty.layers[layer])
        assert isinstance(block, Block)
        return block

    def block(self, layer: int) -> Block:
        """Layer `layer` with its weights."""
        return self.part(f"layers.{layer}", self.empty_block(layer))

    def ends(self, *, sight: bool = True) -> Decoder:
        """A decoder without its layers: embedding, final norm, head, and the multi-token predictor and `sight` where there are such."""
        ends = self.skeleton_ends()
        if not sight:
            ends.sight = None
        ends.load_state_dict(self.tensors("", without=() if sight else ("sight.",)), assign=True)
        return ends.eval().requires_grad_(False)

    def skeleton_ends(self) -> Decoder:
        """`ends` without weights."""
        ends = copy.deepcopy(self._empty)
        ends.layers = nn.ModuleList()
        return ends

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Elements and inputs of every parameter, by the name of its module (of an expert stack: both matrices together)."""
        sizes: dict[str, tuple[int, int]] = {}
        for name, value in self._empty.state_dict().items():
            module = name.rpartition(".")[0]
            count, width = sizes.get(module, (0, value.shape[-1]))
            sizes[module] = (count + value.numel(), width)
        return sizes

    def part(self, name: str, module: M) -> M:
        """Fill `module`, the empty module called `name` in the decoder, from the files."""
        state = self.tensors(f"{name}.")
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items()}, assign=True)
        return module.eval().requires_grad_(False)

    def tensors(self, prefix: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Parameters whose names begin with `prefix`, or for "" all outside the layers; none that begins with a word of `without`.

        Raises CheckpointError for weights that are no numbers.
        """
        every = {name: tuple(value.shape) for name, value in self._empty.state_dict().items()}
        inside = [name for name in every if (name.startswith(prefix) if prefix else not name.startswith("layers."))]
        wanted = {name: every[name] for name in inside if not name.startswith(without)}
        plan = replace(self.opened.plan, pieces=tuple(piece for piece in self.opened.plan.pieces if piece.ours in wanted))
        return load_pieces(plan, self.opened.files, wanted, lambda name: torch.float32)

    def close(self) -> None:
        """Unmap the files."""
        self.opened.files.close()
