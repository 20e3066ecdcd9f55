"""Every published model of the family as a table: how big it is, what it costs in memory, and whether it is here already.

All numbers are counted from the configurations (`models.counts`), so this loads no torch and needs no network.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.config import Environment
from ernie45.models.config import TextConfig
from ernie45.models.counts import count_release, kv_bytes_per_token, weight_bytes
from ernie45.models.released import RELEASES, Release
from ernie45.recipes.terminal import Style, size_text, terminal_columns

# What the starter is made of; the folder itself is made on first use (`models.starter`), and a test compares the two.
STARTER = Release(
    name="starter",
    text=TextConfig(
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        ffn_size=1536,
        vocab_size=49_152,
        rope_theta=100_000.0,
        max_positions=8192,
    ),
    tuning="chat",
    stored="fp32",
    note="SmolLM2-135M-Instruct in ERNIE 4.5 form; no ERNIE weights",
)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List every published model of the family: layers, widths, experts, parameters, bytes, and whether it is in the local cache."""

    json: bool = False
    """Print a JSON list with exact numbers."""


@dataclass(frozen=True)
class Column:
    """One column: its title, the text of a row, and how early it goes when the terminal is narrow (0 stays)."""

    title: str
    text: Callable[[dict[str, Any]], str]
    goes: int = 0
    left: bool = False


def run(config: ModelsConfig, environment: Environment) -> int:
    """Print the table, or JSON."""
    rows = [row(release, is_cached(release, environment)) for release in (*RELEASES, STARTER)]
    if config.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        style = Style.of(sys.stdout, environment)
        print("\n".join(table(rows, style, terminal_columns() if style.ansi else None)))
    return 0


def row(release: Release, cached: bool) -> dict[str, Any]:
    """One model as plain data. Bytes are of all weights, MTP included, without the scales that quantised files add."""
    text, count = release.text, count_release(release)
    experts = text.experts
    return {
        "name": release.name,
        "hub": [] if release is STARTER else list(release.hub_names),
        "tuning": release.tuning,
        "stored": release.stored,
        "layers": text.num_layers,
        "width": text.hidden_size,
        "ffn_width": text.ffn_size,
        "heads": text.num_heads,
        "kv_heads": text.num_kv_heads,
        "head_size": text.head_size,
        "vocabulary": text.vocab_size,
        "experts": experts
        and {
            "routed": experts.num_experts,
            "per_token": experts.top_k,
            "shared": experts.num_shared,
            "width": experts.expert_size,
            "vision_routed": experts.num_experts if release.vision else 0,
            "vision_width": release.vision.expert_size if release.vision else 0,
        },
        "parameters": count.total,
        "parameters_mtp": count.mtp,
        "active": count.active,
        "active_with_head": count.active_with_head,
        "bytes": {"bf16": weight_bytes(count, 16), "int8": weight_bytes(count, 8), "int4": weight_bytes(count, 4)},
        "kv_bytes_per_token": kv_bytes_per_token(text),
        "tied": text.tie_embeddings,
        "mtp": text.num_mtp > 0,
        "vision": release.vision is not None,
        "context": text.max_positions,
        "cached": cached,
        "note": release.note,
    }


def is_cached(release: Release, environment: Environment) -> bool:
    """Whether a whole copy is on this disk: every file its index names, in the project's cache or the Hub's."""
    if release is STARTER:
        return any(path.is_dir() for path in environment.cache_dir.glob("starter-*"))
    home = environment.hf_home or Path.home() / ".cache" / "huggingface"
    folders = [home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" for name in release.hub_names]
    return any(_is_whole(snapshot) for folder in folders if folder.is_dir() for snapshot in folder.iterdir())


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return all((folder / os.path.basename(shard)).is_file() for shard in set(index["weight_map"].values()))
    except FileNotFoundError:
        return (folder / "model.safetensors").is_file()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # a damaged index: `ernie inspect` says how


def table(rows: Sequence[dict[str, Any]], style: Style, columns: int | None) -> list[str]:
    """The rows as lines no wider than `columns`; None (a pipe) gives every column with exact numbers.

    A narrow terminal gets rounded numbers first and fewer columns after that.
    """
    chosen = _columns(exact=True)
    if columns is not None and _width(chosen, rows) > columns:
        chosen = _columns(exact=False)
        while _width(chosen, rows) > columns and any(column.goes for column in chosen):
            first = max(column.goes for column in chosen)
            chosen = [column for column in chosen if column.goes != first]
    lines = [style.bold(_line([column.title for column in chosen], chosen, rows))]
    lines += [_line([column.text(r) for column in chosen], chosen, rows) for r in rows]
    notes = [
        "Active: parameters one text token meets, without embedding and head. Bytes: all weights, without the scales of quantised files.",
        f"KV: memory of one token of context in bf16. {STARTER.name}: {STARTER.note}.",
    ]
    hidden = len(_columns(exact=False)) - len(chosen)
    if hidden:
        notes.append(f"{hidden} columns do not fit into this window; `ernie models --json` has everything.")
    lines.append("")
    for note in notes:
        lines += [style.dim(part) for part in _folded(note, columns)]
    return lines


def _columns(exact: bool) -> list[Column]:
    number = (lambda n: f"{n:,}") if exact else (lambda n: size_text(n, "").replace("G", "B"))
    yes = {True: "yes", False: "-"}
    return [
        Column("model", lambda r: r["name"].removeprefix("ERNIE-4.5-") if not exact else r["name"], left=True),
        Column("kind", lambda r: r["tuning"], goes=4, left=True),
        Column("layers", lambda r: str(r["layers"]), goes=6),
        Column("width", lambda r: f"{r['width']}", goes=6),
        Column("heads/kv", lambda r: f"{r['heads']}/{r['kv_heads']}", goes=6),
        Column("experts", _experts, goes=5),
        Column("parameters", lambda r: number(r["parameters"])),
        Column("active", lambda r: number(r["active"]), goes=2),
        Column("bf16", lambda r: size_text(r["bytes"]["bf16"]), goes=2),
        Column("int8", lambda r: size_text(r["bytes"]["int8"]), goes=7),
        Column("int4", lambda r: size_text(r["bytes"]["int4"]), goes=3),
        Column("KV", lambda r: size_text(r["kv_bytes_per_token"]), goes=5),
        Column("tied", lambda r: yes[r["tied"]], goes=9),
        Column("MTP", lambda r: yes[r["mtp"]], goes=8),
        Column("vision", lambda r: yes[r["vision"]], goes=8),
        Column("context", lambda r: f"{r['context'] // 1024}K", goes=7),
        Column("here", lambda r: yes[r["cached"]], goes=1),
    ]


def _experts(r: dict[str, Any]) -> str:
    experts = r["experts"]
    if not experts:
        return "-"
    text = f"{experts['per_token']} of {experts['routed']}"
    return text + (f" + {experts['shared']}" if experts["shared"] else "")


def _cells(column: Column, rows: Sequence[dict[str, Any]]) -> int:
    return max(len(column.title), *(len(column.text(r)) for r in rows))


def _width(chosen: Sequence[Column], rows: Sequence[dict[str, Any]]) -> int:
    return sum(_cells(column, rows) + 2 for column in chosen) - 2


def _line(texts: Sequence[str], chosen: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    cells = zip(texts, chosen, strict=True)
    return "  ".join(f"{t:<{_cells(c, rows)}}" if c.left else f"{t:>{_cells(c, rows)}}" for t, c in cells).rstrip()


def _folded(note: str, columns: int | None) -> list[str]:
    from textwrap import wrap

    return [note] if columns is None else wrap(note, max(columns, 20))
