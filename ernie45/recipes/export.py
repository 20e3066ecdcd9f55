"""`ernie export MODEL --out PATH`: a model as a file for another program, or as a folder with an adapter merged in."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.adapters import load_adapter
from ernie45.models.compressed_export import CompressedExport, export_compressed
from ernie45.models.gguf_export import Exported, export_gguf
from ernie45.models.load import LoadedModel, find_model, load, open_model
from ernie45.models.save import save_model, save_packed
from ernie45.nn.lora import merge
from ernie45.quant.frozen import freeze, thaw, unpack_model

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as one GGUF file, which llama.cpp and its kin run, or as a model folder, whole or quantised for vLLM."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder, GGUF file, Hub name, or `starter`."""
    out: Path
    """The file or folder to write; it must not exist yet."""
    format: Literal["gguf", "folder", "compressed-tensors"] = "gguf"
    """gguf is one file; folder is a model folder for this project, transformers and vLLM; compressed-tensors a quantised one for vLLM."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "packed"] = "f16"
    """How the matrices are stored: 32, 16, 16, 8.5 or 4.5 bits a weight; `packed`: as those of a quantised MODEL are (folders only)."""
    scheme: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """For compressed-tensors, of a float MODEL: w4a16-g128, w8a16-g64, w8a8, fp8-block, fp8-channel or fp8-tensor, rounded to nearest."""
    adapter: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")] = None
    """A PEFT adapter folder to merge into the model first (folders only)."""

    def __post_init__(self) -> None:
        if self.format == "gguf" and (self.adapter or self.type == "packed"):
            raise ConfigError("--adapter and --type packed need --format folder; export the folder that they give as GGUF afterwards")
        if self.format == "compressed-tensors" and (self.adapter or self.type != "f16"):
            raise ConfigError(
                "--format compressed-tensors takes neither --adapter nor --type: merge first, and give --scheme for a float model"
            )
        if self.format != "compressed-tensors" and self.scheme is not None:
            raise ConfigError("--scheme is for --format compressed-tensors; for the other formats give --type")
        if self.format == "folder" and self.type not in (*_FLOATS, "packed"):
            raise ConfigError(f"--type {self.type} is a type of GGUF files; a folder takes {', '.join(_FLOATS)} or packed")


def run(config: ExportConfig, environment: Environment) -> int:
    """Write the file or folder and say what it holds. Raises `CheckpointError` for anything that cannot be exported."""
    if config.format == "folder":
        export_folder(config, environment)
        print(f"{config.out}: ready; try: ernie chat {config.out}")
        return 0
    if config.format == "compressed-tensors":
        compressed = export_compressed_folder(config, environment)
        counts = ", ".join(f"{count} {form}" for form, count in sorted(compressed.formats.items()))
        print("\n".join([f"{config.out}: {compressed.size:,} bytes; matrices: {counts}", *compressed.notes]))
        return 0
    result = export(config, environment)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
    print(f"{config.out}: {result.size:,} bytes; tensors: {kinds}")
    return 0


def export_folder(config: ExportConfig, environment: Environment) -> None:
    """Load the model in float32, merge the adapter, and write the folder, with a model card.

    A quantised model becomes floats, or with `--type packed` keeps its packing: each matrix is then rounded once, to nearest, after the
    merge. Raises `CheckpointError` for an adapter of another model, and for `packed` where the model is not.
    """
    loaded = load(config.model, dtype="float32", environment=environment)
    spec, source = loaded.opened.spec, loaded.opened.path
    companions = source if source.is_dir() else None
    if config.type != "packed":
        decoder = loaded.decoder
        unpack_model(decoder, torch.float32)
        _merge_adapter(loaded, config.adapter)
        save_model(decoder, config.out, dtype=getattr(torch, _FLOATS[config.type]), companions=companions)
    elif spec is None:
        raise CheckpointError(f"{source} is not quantised; take --type bf16, or quantise the result with `ernie quantize`")
    else:
        freeze(loaded.decoder)
        _merge_adapter(loaded, config.adapter)
        thaw(loaded.decoder)
        save_packed(loaded.decoder, config.out, spec, made_by="adapter merged and rounded to nearest", companions=companions)
    (config.out / "README.md").write_text(_card(config), "utf-8")


def _card(config: ExportConfig) -> str:
    """The model card of an exported folder."""
    stored = f"matrices as {config.type}" + (f", the adapter {config.adapter} merged" if config.adapter else "")
    return f"# Exported from {config.model}\n\nWritten by ernie45, {stored}. The licence of the base model applies.\n"


def export_compressed_folder(config: ExportConfig, environment: Environment) -> CompressedExport:
    """Find the model and write it in the format of compressed-tensors, with progress where the error stream is a terminal."""
    opened = open_model(find_model(config.model, environment, lambda line: print(line, file=sys.stderr)))
    with opened.files:
        return export_compressed(opened, config.scheme, config.out, told=_show if sys.stderr.isatty() else None)


def _merge_adapter(loaded: LoadedModel, adapter: Path | None) -> None:
    if adapter is not None:
        load_adapter(loaded.decoder, adapter)
        merge(loaded.decoder)


def export(config: ExportConfig, environment: Environment) -> Exported:
    """Find the model, export it, and show progress on the error stream where that is a terminal."""
    if config.out.is_dir():
        raise CheckpointError(f"{config.out} is a folder; give the name of the file to write, such as {config.out / 'model.gguf'}")
    opened = open_model(find_model(config.model, environment, lambda line: print(line, file=sys.stderr)))
    with opened.files:
        return export_gguf(opened, config.type, config.out, progress=_show if sys.stderr.isatty() else None)


def _show(name: str, done: int, total: int) -> None:
    """One line that overwrites itself."""
    print(f"\r\x1b[K{done}/{total} {name}", end="\n" if done == total else "", file=sys.stderr, flush=True)
