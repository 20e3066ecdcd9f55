"""What a training run leaves in its folder, read while it grows: the log, the settings, the samples.

The reader never writes and never locks, so it cannot disturb a run; a line that is half written is left for the next look, and a log that
became shorter (a run was resumed from its checkpoint) is read again from its start.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LOG, SAMPLES, SETTINGS, PLAN, RESULT = "log.jsonl", "samples.jsonl", "settings.json", "plan.json", "model"

MAX_POINTS = 1000
"""Points of a curve that are handed out; longer runs are drawn by means of neighbouring steps, with the least and the largest loss."""
MAX_MOMENTS = 160
"""Columns of the picture of the experts' load."""
MAX_SAMPLES = 200
_QUIET_SECONDS = 60.0
"""A run that writes nothing for so long, and for ten of its steps, is taken to have stopped."""
_RANGE = "loss"
_HIDDEN = ("load", "memory", "work", "layer_work", "seconds", "tokens", "learned", "skipped", "step")

Row = dict[str, Any]


class Lines:
    """A file of JSON lines, read on from where the last look ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def look(self) -> list[Row]:
        """All whole lines so far that hold an object; whatever else stands in the file is passed over."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._offset:
                    self.rows, self._offset, self._identity = [], 0, identity
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return self.rows
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self.rows.append(row)
        return self.rows


class RunFolder:
    """One run: its folder, named for people, and what can be drawn of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._log = Lines(folder / LOG)
        self._samples = Lines(folder / SAMPLES)

    def rows(self) -> list[Row]:
        """The steps so far, in order; a step that was done again after a resume counts once, as it was done last."""
        by_step = {row["step"]: row for row in self._log.look() if isinstance(row.get("step"), int)}
        return [by_step[step] for step in sorted(by_step)]

    def state(self, rows: Sequence[Row]) -> str:
        """`finished`, `running`, `stopped`, or `waiting` before the first step."""
        if (self.folder / RESULT).exists():
            return "finished"
        if not rows:
            return "waiting"
        seconds = [value for row in rows[-20:] if (value := number(row.get("seconds"))) is not None]
        patience = max(_QUIET_SECONDS, 10 * statistics.median(seconds)) if seconds else _QUIET_SECONDS
        try:
            return "running" if time.time() - (self.folder / LOG).stat().st_mtime < patience else "stopped"
        except OSError:
            return "stopped"

    def fact(self, name: str) -> Row:
        """One file of plain data in the folder; empty when it cannot be read."""
        try:
            data = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def samples(self) -> list[Row]:
        """The newest texts that the model wrote on the way: `{step, prompt, text}`."""
        return [
            {"step": row.get("step"), "prompt": str(row.get("prompt", "")), "text": str(row.get("text", ""))}
            for row in self._samples.look()[-MAX_SAMPLES:]
        ]

    def report(self) -> Row:
        """Everything the page draws, but the experts' load: curves of at most `MAX_POINTS` points."""
        rows = self.rows()
        seeing = next((found for row in reversed(rows) if (found := _load(row, "vision_load"))), [])
        return {
            "name": self.name,
            "state": self.state(rows),
            "steps": len(rows),
            "planned": number(self.fact(PLAN).get("steps")),
            "last": {key: value for key, value in rows[-1].items() if key not in ("load", "vision_load", "memory")} if rows else {},
            "memory": next((row["memory"] for row in reversed(rows) if isinstance(row.get("memory"), dict)), {}),
            "skipped": sum(bool(row.get("skipped")) for row in rows),
            "settings": self.fact(SETTINGS),
            "curves": curves(rows),
            "load": _load(rows[-1], "load") if rows else [],
            "vision_load": seeing,
            "samples": self.samples(),
        }

    def load_over_time(self, layer: int) -> Row:
        """The load of each expert of one layer over the run: `{steps: [...], loads: [[...]]}`, at most `MAX_MOMENTS` moments.

        Layers of vision experts are counted on behind those of text experts.
        """
        rows = [(row["step"], loads[layer]) for row in self.rows() if len(loads := _loads(row)) > layer >= 0]
        steps, moments = [], []
        for part in _parts(rows, MAX_MOMENTS):
            steps.append(part[-1][0])
            moments.append([round(sum(values) / len(values), 3) for values in zip(*(load for _, load in part), strict=False)])
        return {"steps": steps, "loads": moments}


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs in `paths`: each is a run's folder, or a folder of such folders. Names are the shortest that tell them apart."""
    folders: list[Path] = []
    for path in paths:
        found = [path] if is_run(path) else sorted(child for child in path.iterdir() if is_run(child)) if path.is_dir() else []
        folders += [folder.resolve() for folder in found]
    folders = list(dict.fromkeys(folders))
    names = {folder: folder.name for folder in folders}
    if len(set(names.values())) < len(names):
        names = {folder: f"{folder.parent.name}/{folder.name}" for folder in folders}
    if len(set(names.values())) < len(names):
        names = {folder: str(folder) for folder in folders}
    return [RunFolder(folder, names[folder]) for folder in folders]


def is_run(folder: Path) -> bool:
    """Whether a training run wrote this folder."""
    return (folder / LOG).is_file() or (folder / SETTINGS).is_file()


def curves(rows: Sequence[Row], points: int = MAX_POINTS) -> dict[str, list[float | None]]:
    """Columns of numbers over the run: `step`, `tokens` and `seconds` add up from its start, all else is the mean of a point's steps.

    `loss.low` and `loss.high` are the least and the largest loss of a point; a number that no step of a point has is None.
    """
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if key not in _HIDDEN and number(value) is not None))
    columns: dict[str, list[float | None]] = {name: [] for name in ("step", "tokens", "seconds", *names)}
    if _RANGE in names:
        columns |= {f"{_RANGE}.low": [], f"{_RANGE}.high": []}
    if any(_loads(row) for row in rows):
        columns["load.max"] = []
    tokens = seconds = 0.0
    for part in _parts(rows, points):
        tokens += sum(number(row.get("tokens")) or 0 for row in part)
        seconds += sum(number(row.get("seconds")) or 0 for row in part)
        columns["step"].append(part[-1]["step"])
        columns["tokens"].append(tokens)
        columns["seconds"].append(round(seconds, 3))
        for name in names:
            values = [value for row in part if (value := number(row.get(name))) is not None]
            columns[name].append(_short(sum(values) / len(values)) if values else None)
            if name == _RANGE:
                columns[f"{name}.low"].append(min(values, default=None))
                columns[f"{name}.high"].append(max(values, default=None))
        if "load.max" in columns:
            columns["load.max"].append(max((max(load) for row in part for load in _loads(row)), default=None))
    return columns


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _parts(rows: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """`rows` in at most `most` runs of neighbours of equal length (the last may be shorter)."""
    size = -(-len(rows) // most) if rows else 1
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _loads(row: Row) -> list[list[float]]:
    """The load of one step, one list a layer: of the text experts, then of the vision experts."""
    return _load(row, "load") + _load(row, "vision_load")


def _load(row: Row, name: str) -> list[list[float]]:
    """One list a layer; empty when it is not of that form."""
    loads = row.get(name)
    if not isinstance(loads, list) or not all(
        isinstance(layer, list) and layer and all(number(value) is not None for value in layer) for layer in loads
    ):
        return []
    return loads
