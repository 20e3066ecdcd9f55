"""From a `Decoder` to a model folder that this project, transformers and Paddle tools read: `config.json` and safetensors.

The folder appears complete or not at all, and tensors are cut out of the parameters one at a time.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.models.names import FLOAT32_ENDINGS, LAYOUTS, name_table
from ernie45.models.packed import packed_entry
from ernie45.models.text import Decoder
from ernie45.quant.spec import QuantSpec
from ernie45.weights.rename import Piece
from ernie45.weights.safetensors_write import SHARD_BYTES, TensorSpec, check_room, write_safetensors
from ernie45.weights.stream import save_tensor

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "Roboto-Regular.ttf",  # the timestamps on video frames are drawn with it
    "LICENSE",
)
"""Files of a model folder that do not depend on its weights."""


def save_model(
    decoder: Decoder,
    folder: Path,
    *,
    layout: str = "pt",
    dtype: torch.dtype | None = None,
    companions: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `decoder` as a new model folder in `layout` "pt" (Hugging Face), "fused" or "paddle".

    Weights are stored as they are held, or as `dtype`; the router stays float32. `companions` is a folder whose tokenizer and generation
    files are copied along, so that the new folder chats as it stands. Raises CheckpointError when `folder` exists and is not empty, or the
    disk has too little room; nothing is left behind then.
    """
    if layout not in LAYOUTS or layout == "gguf":
        raise CheckpointError(f"layout '{layout}' is not a folder layout; allowed: {', '.join(name for name in LAYOUTS if name != 'gguf')}")
    parameters = decoder.state_dict()
    config = decoder.model_config
    body = config.to_hf(original=layout == "paddle") | {"torch_dtype": str(dtype or decoder.dtype).removeprefix("torch.")}
    plan = name_table(decoder.config, layout, sighted=config.vision is not None).save_plan(
        {name: tuple(value.shape) for name, value in parameters.items()}
    )
    pieces: dict[str, list[Piece]] = {}
    for piece in plan:
        pieces.setdefault(piece.file, []).append(piece)
    specs = [_spec(same[0], parameters[same[0].ours], dtype) for same in pieces.values()]
    with new_folder(folder) as partial:
        check_room(partial, sum(spec.nbytes for spec in specs))
        kinds = {spec.name: spec.dtype for spec in specs}
        write_safetensors(partial, specs, lambda file: save_tensor(pieces[file], parameters, kinds[file]), shard_bytes=shard_bytes)
        _finish(partial, body, companions)


def save_packed(decoder: Decoder, folder: Path, spec: QuantSpec, *, made_by: str, companions: Path | None = None) -> None:
    """Write a packed `decoder`, whose matrices are as `spec` says, as a new folder of the kind `ernie quantize` writes.

    `made_by` is kept in the config for people. `companions` and errors are as for `save_model`.
    """
    tensors = decoder.state_dict()
    config = decoder.model_config
    body = config.to_hf() | {
        "torch_dtype": str(decoder.dtype).removeprefix("torch."),
        "quantization_config": packed_entry(spec, made_by),
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with new_folder(folder) as partial:
        check_room(partial, sum(spec.nbytes for spec in specs))
        write_safetensors(partial, specs, tensors.__getitem__)
        _finish(partial, body, companions)


def _finish(partial: Path, body: Mapping[str, Any], companions: Path | None) -> None:
    """The config, and the companions copied along."""
    (partial / "config.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    if companions is not None:
        copy_companions(companions, partial)


def copy_companions(source: Path, target: Path) -> None:
    """Copy those of `COMPANIONS` that the folder `source` has into the folder `target`."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write that becomes `folder` when the block ends well, and is gone when it does not.

    Raises CheckpointError when `folder` exists and is not empty, before anything is written, and when the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder; choose another name, or remove it first")
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _spec(piece: Piece, parameter: Tensor, dtype: torch.dtype | None) -> TensorSpec:
    kept = dtype is None or piece.ours.endswith(FLOAT32_ENDINGS)
    return TensorSpec(piece.file, parameter.dtype if kept or dtype is None else dtype, piece.shape)
