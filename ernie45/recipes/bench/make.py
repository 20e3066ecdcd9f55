"""`ernie bench make SHAPE --scheme S --out DIR`: a checkpoint of random weights in a published shape, for measuring speed and memory.

ernie bench make --list
ernie bench make 0.3B --out shape-0.3B                      bfloat16, the published layout: any engine reads it
ernie bench make 21B-A3B --scheme w4a8 --out shape-21B      4 bits, packed as they are written: 12 GB on the disk, 1 GB of memory
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ernie45.config import Environment
from ernie45.errors import ConfigError, did_you_mean
from ernie45.models.config import TextConfig
from ernie45.models.counts import count_parameters
from ernie45.models.released import RELEASES, tiny
from ernie45.quant.spec import QuantSpec, Rule, Scheme
from ernie45.recipes.models import STARTER
from ernie45.recipes.terminal import progress_bar, size_text

WHOLE = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Write a checkpoint of random weights in a published shape. It runs as fast as the real one and writes noise."""

    shape: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHAPE")] = ""
    """0.3B, 21B-A3B, ... (--list shows all); tiny and tiny-experts are for trials."""
    out: Path = Path()
    """The folder to write; it must not exist yet."""
    scheme: str = "bfloat16"
    """bfloat16 or float32 for whole weights, or what `ernie quantize` takes: w4a8, w8a8, w4a8-g32."""
    group: int = 64
    """Inputs that share a scale, for schemes that do not say it: 32, 64, 128, or 0 for a whole row."""
    head: str = "w8a8"
    """Scheme of the output head and an embedding tied to it, where a scheme is given; `whole` keeps it in float32."""
    seed: int = 0
    """The same seed gives the same files."""
    list: bool = False
    """Show every shape and what it takes, and write nothing."""

    def __post_init__(self) -> None:
        if self.list:
            return
        if not self.shape:
            raise ConfigError("ernie bench make needs a SHAPE; `ernie bench make --list` shows all")
        shapes = every_shape()
        if self.shape not in shapes:
            raise ConfigError(f"'{self.shape}' is no shape{did_you_mean(self.shape, shapes)}; `ernie bench make --list` shows all")
        if self.out == Path():
            raise ConfigError("--out is missing: the folder to write")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"--seed is {self.seed}; it must lie between 0 and {(1 << 31) - 1}")
        self.spec()

    def spec(self) -> QuantSpec | None:
        """What is packed and how; None for whole weights. Raises `ConfigError` for a word that is no scheme."""
        if self.scheme in WHOLE:
            return None
        word = self.scheme if "-g" in self.scheme or not self.group else f"{self.scheme}-g{self.group}"
        tied = every_shape()[self.shape].tie_embeddings
        head = Rule(pattern="embed" if tied else "head", scheme=None if self.head == "whole" else str(Scheme.parse(self.head)))
        return QuantSpec(rules=(head, Rule(pattern="*", scheme=str(Scheme.parse(word)))))


def every_shape() -> dict[str, TextConfig]:
    """Name -> sizes, of every published text model, the starter and the trial models."""
    shapes = {
        release.name.removeprefix("ERNIE-4.5-"): release.text for release in RELEASES if release.vision is None and release.stored == "bf16"
    }
    return shapes | {STARTER.name: STARTER.text, "tiny": tiny(), "tiny-experts": tiny(experts=True)}


def run(config: MakeConfig, environment: Environment) -> int:
    """Write the folder, or print the list. Returns the exit code. Raises CheckpointError when the folder or the disk refuses."""
    if config.list:
        print(table())
        return 0
    made = make(config, environment)
    print(f"{made['folder']}: {config.shape}, {config.scheme}, {made['bytes']:,} bytes of random weights", file=sys.stderr)
    print(json.dumps(made))
    return 0


def make(config: MakeConfig, environment: Environment) -> dict[str, Any]:
    """The folder and its bytes."""
    with progress_bar(environment) as progress:
        progress("starting", 0, 0)
        import torch

        from ernie45.models.random_weights import write_random

        dtype = (
            torch.bfloat16 if config.scheme == "bfloat16" else torch.float32
        )  # packed models hold the rest in float32, as quantised ones do
        written = write_random(every_shape()[config.shape], config.out, spec=config.spec(), dtype=dtype, seed=config.seed, told=progress)
    return {"folder": str(config.out), "shape": config.shape, "scheme": config.scheme, "bytes": written}


def table() -> str:
    """Every shape with its parameters and bytes."""
    rows: list[tuple[str, ...]] = [("shape", "layers", "experts", "parameters", "active", "bfloat16", "w8a8", "w4a8")]
    for name, text in every_shape().items():
        count = count_parameters(text)
        whole, experts = count.total + count.mtp, text.experts
        shown = f"{experts.num_experts}, {experts.top_k} a token" if experts else "none"
        # 8.25 and 4.25 bits a weight with groups of 64; the head keeps 8
        packed = [size_text((whole * bits + text.vocab_size * text.hidden_size * (8 - int(bits))) / 8) for bits in (8.25, 4.25)]
        rows.append(
            (name, str(text.num_layers), shown, size_text(whole, ""), size_text(count.active_with_head, ""), size_text(whole * 2), *packed)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i in (0, 2) else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    seeing = ", ".join(release.name.removeprefix("ERNIE-4.5-") for release in RELEASES if release.vision is not None)
    return "\n".join([*lines, f"not yet, since they cannot be loaded: {seeing}"])
