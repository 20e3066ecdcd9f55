"""`ernie export MODEL --out FILE`: a model as a file for another program."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.models.gguf_export import Exported, export_gguf
from ernie45.models.load import find_model, open_model


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as one GGUF file, which llama.cpp and its kin run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder, GGUF file, Hub name, or `starter`."""
    out: Path
    """The file to write; it must not exist yet."""
    format: Literal["gguf"] = "gguf"
    """The file format."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16"
    """How the matrices are stored: 32, 16, 16, 8.5 or 4.5 bits a weight."""


def run(config: ExportConfig, environment: Environment) -> int:
    """Write the file and say what it holds. Raises `CheckpointError` for anything that cannot be exported."""
    result = export(config, environment)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
    print(f"{config.out}: {result.size:,} bytes; tensors: {kinds}")
    return 0


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
