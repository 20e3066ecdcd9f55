"""A model folder as a GGUF file that llama.cpp runs, written one parameter at a time.

Number formats follow llama.cpp's habits where it depends on them: norms, biases and the router are float32, and a matrix whose rows do not
divide into blocks stays float16. At four bits the matrix that makes the logits gets eight: every choice of a token reads it whole.
A multi-token prediction block has no place in llama.cpp's ERNIE models and is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.models.config import TextConfig
from ernie45.models.gguf_config import config_to_gguf
from ernie45.models.load import OpenModel, read_config
from ernie45.models.names import FLOAT32_ENDINGS, name_table
from ernie45.tokens.gguf_vocabulary import gguf_from_tokenizer
from ernie45.weights.gguf import GgufFile
from ernie45.weights.gguf_blocks import BlockType, writable_type
from ernie45.weights.gguf_write import GgufSpec, write_gguf
from ernie45.weights.rename import LoadPlan, Piece, Shape
from ernie45.weights.stream import load_pieces, save_piece

# llama.cpp's `general.file_type` of a file that is mostly of one format
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_QUANTISATION_VERSION = 2


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the file, and how many tensors have each number format."""

    size: int
    formats: dict[str, int]


def export_gguf(opened: OpenModel, type_name: str, out: Path, *, progress: Callable[[str, int, int], None] | None = None) -> Exported:
    """Write the model `opened` as `out` in the number format `type_name` ("f32", "f16", "bf16", "q8_0", "q4_0").

    Raises `CheckpointError` when the model is not whole, llama.cpp cannot express it, the disk has too little room, or a weight is NaN;
    `TokenizerError` when llama.cpp has no name for its tokenizer. Nothing is left behind then.
    """
    kind = writable_type(type_name)
    if not opened.plan.complete:
        raise CheckpointError(opened.complaint())
    _refuse_inexpressible(opened.config, opened.path)
    shapes = parameter_shapes(opened.plan)
    pieces = name_table(opened.config, "gguf").save_plan(shapes)
    specs = [GgufSpec(piece.file, _format(piece, kind, opened.config), piece.shape) for piece in pieces]
    metadata = _metadata(opened, kind)
    size = write_gguf(out, metadata, specs, _Producer(opened, pieces, shapes, progress))
    formats: dict[str, int] = {}
    for spec in specs:
        formats[spec.type.name] = formats.get(spec.type.name, 0) + 1
    return Exported(size, formats)


def parameter_shapes(plan: LoadPlan) -> dict[str, Shape]:
    """Shape of every parameter a GGUF file has, from the boxes that make it up."""
    shapes: dict[str, Shape] = {}
    for piece in plan.pieces:
        if not piece.ours.startswith("mtp."):
            ends = tuple(end for _, end in piece.box)
            shapes[piece.ours] = tuple(map(max, shapes.get(piece.ours, ends), ends))
    return shapes


class _Producer:
    """Makes GGUF tensors in the order of their parameters and holds one parameter at a time."""

    def __init__(
        self, opened: OpenModel, pieces: tuple[Piece, ...], shapes: dict[str, Shape], progress: Callable[[str, int, int], None] | None
    ) -> None:
        self._opened = opened
        self._pieces = {piece.file: piece for piece in pieces}
        self._shapes = shapes
        self._progress = progress
        self._sources: dict[str, list[Piece]] = {}
        for piece in opened.plan.pieces:
            self._sources.setdefault(piece.ours, []).append(piece)
        self._name, self._held, self._done = "", torch.empty(0), 0

    def __call__(self, file: str) -> Tensor:
        piece = self._pieces[file]
        if piece.ours != self._name:
            self._held = torch.empty(0)
            self._held = self._load(piece.ours)
            self._name = piece.ours
        self._done += 1
        if self._progress:
            self._progress(file, self._done, len(self._pieces))
        return save_piece(piece, self._held, self._held.dtype)

    def _load(self, name: str) -> Tensor:
        files = self._opened.files
        # a quantised source holds finer numbers than bfloat16 can: scale times code
        exact = isinstance(files, GgufFile) or name.endswith(FLOAT32_ENDINGS)
        dtype = torch.float32 if exact else self._opened.stored
        plan = LoadPlan(tuple(self._sources[name]))
        return load_pieces(plan, files, {name: self._shapes[name]}, lambda _: dtype)[name]


def _format(piece: Piece, kind: BlockType, config: TextConfig) -> BlockType:
    """The number format of one tensor."""
    if len(piece.shape) == 1 or piece.ours.endswith(FLOAT32_ENDINGS):
        return writable_type("F32")
    makes_logits = piece.ours == ("embed.weight" if config.tie_embeddings else "head.weight")
    chosen = writable_type("Q8_0") if makes_logits and kind.name == "Q4_0" else kind
    return chosen if piece.shape[-1] % chosen.values == 0 else writable_type("F16")


def _metadata(opened: OpenModel, kind: BlockType) -> dict[str, Any]:
    config = opened.config
    data = config_to_gguf(config) | {
        "general.type": "model",
        "general.name": opened.path.stem if opened.path.is_file() else opened.path.resolve().name,
        "general.file_type": FILE_TYPES[kind.name],
        "general.quantization_version": _QUANTISATION_VERSION,
    }
    if isinstance(opened.files, GgufFile):
        return data | {key: value for key, value in opened.files.metadata.items() if key.startswith("tokenizer.")}
    source = read_config(opened.path).get("ernie45_source")
    if isinstance(source, str):
        data["general.description"] = source
    defaults = {
        "tokenizer.ggml.bos_token_id": config.bos_id,
        "tokenizer.ggml.eos_token_id": config.eos_id,
        "tokenizer.ggml.padding_token_id": config.pad_id,
    }
    return data | defaults | gguf_from_tokenizer(opened.path, config.vocab_size)


def _refuse_inexpressible(config: TextConfig, path: Path) -> None:
    """What llama.cpp's ERNIE models have no word for; written anyway, the file would load and compute something else."""
    if config.use_bias:
        raise CheckpointError(f"{path}: its Linear layers have biases (use_bias), which llama.cpp's ERNIE 4.5 has no tensors for")
    e = config.experts
    if e is None:
        return
    expert_layers = [layer for layer in range(config.num_layers) if config.is_expert_layer(layer)]
    if expert_layers != list(range(e.first_layer, config.num_layers)):
        raise CheckpointError(
            f"{path}: the layers with experts are {expert_layers}, but llama.cpp gives experts to every layer from the first such one to "
            "the last of the model; it cannot run this one"
        )
