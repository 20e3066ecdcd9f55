"""What a step cost: its share of what the devices can do, and the bytes it took by kind.

MFU counts what the model needs (`plan.flops`), HFU what the device did, recomputation included. Source of the two terms: arXiv 2204.02311,
appendix B.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ernie45.parallel.shard import own_bytes
from ernie45.train.optim import MovingAverage, Optimiser
from ernie45.train.step import StepReport

_STATUS = Path("/proc/self/status")


def accounted(report: StepReport, peak: float | None, again: float = 0.0, memory: dict[str, int] | None = None) -> StepReport:
    """The report with MFU and HFU, where its work and the devices' `peak` (operations a second, all together) are known.

    again: share of the layers' forward pass that was computed a second time.
    """
    if peak is not None and report.work is not None and report.layer_work is not None:
        could = peak * max(report.seconds, 1e-9)
        done = report.work + again * report.layer_work
        report = replace(report, mfu=round(report.work / could, 4), hfu=round(done / could, 4))
    return report if memory is None else replace(report, memory=memory)


def memory_by_kind(model: nn.Module, optimiser: Optimiser, average: MovingAverage | None) -> dict[str, int]:
    """Bytes on this rank: weights, gradients as large as they become, optimiser, averages, the process at its largest, and what it had then
    beside these, which is what passes keep and compute with (`passes`), and the program itself.

    Weights that are views of their files count as weights, whether or not the system holds their pages.
    """
    weights = [*model.parameters(), *model.buffers()]
    held = {
        "weights": _bytes(weights),
        "gradients": _bytes([parameter for parameter in model.parameters() if parameter.requires_grad]),
        "optimiser": _bytes(list(optimiser.state().values())),
        "averages": _bytes(list(average.weights.values())) if average is not None else 0,
    }
    largest = _largest_resident()
    return held if largest is None else held | {"passes": max(0, largest - sum(held.values())), "process": largest}


def _bytes(tensors: list[Tensor]) -> int:
    return sum(map(own_bytes, tensors))


def _largest_resident() -> int | None:
    """Most bytes of memory that this process has had; on an accelerator, that torch has had there; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
