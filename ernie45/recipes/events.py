"""A run's numbers as TensorBoard events, beside the log that `ernie watch` reads."""

from pathlib import Path
from typing import Any

from ernie45.errors import MissingExtra
from ernie45.train.step import StepReport

FOLDER = "tensorboard"
_GROUPS = {
    "mfu": "speed",
    "hfu": "speed",
    "work": "speed",
    "layer_work": "speed",
    "rate": "train",
    "norm": "train",
    "tokens_per_second": "speed",
    "learned": "train",
    "tokens": "train",
    "seconds": "speed",
}


class Events:
    """Writes every number of a step: `loss/...`, `train/...`, `speed/...`, and `load/layer` for the busiest expert of a layer."""

    def __init__(self, folder: Path) -> None:
        """folder: of the run. Raises MissingExtra without tensorboardX."""
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise MissingExtra("tensorboardX", "train") from None
        self._open, self._folder = SummaryWriter, folder / FOLDER
        self._writer: Any = None

    def __call__(self, report: StepReport) -> None:
        """Write one step. What a killed run wrote beyond its checkpoint is marked as undone by the first step of the next."""
        if self._writer is None:
            self._writer = self._open(str(self._folder), purge_step=report.step)
        for name, value in report.as_json().items():
            if name == "load":
                for layer, shares in enumerate(value):
                    self._writer.add_scalar(f"load/{layer}", max(shares), report.step)
            elif name == "memory":
                for kind, held in value.items():
                    self._writer.add_scalar(f"memory/{kind}", held, report.step)
            elif name not in ("step", "skipped"):
                self._writer.add_scalar(f"{_GROUPS.get(name, 'loss')}/{name}", value, report.step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
