"""Calibration: what the inputs of every matrix of one block look like, gathered while sequences pass through it.

A block is watched by hooks, so any module tree made of `Linear` and `Experts` can be calibrated; nothing of the inputs is kept but their
Gram matrix, mean magnitude and count. Routed experts are counted one by one: an expert that saw too few tokens is calibrated on all of
them, and so is every expert when that is asked for.

Letters: S sequences, L their length, T tokens, D width, I in-width, F width of one expert, P rotary pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.errors import CheckpointError
from ernie45.nn.attention import PackedCausal
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Experts
from ernie45.ops import Routing

SEQUENCES_AT_ONCE = 2  # bounds the memory of a pass: a few hundred megabytes for the widest published layer


class InputStatistics:
    """Gram matrix sum x x^T (float32 [I, I]), sum of |x| [I] and number of the inputs one matrix saw."""

    def __init__(self, size: int) -> None:
        self.gram_II = torch.zeros(size, size)
        self.magnitude_I = torch.zeros(size)
        self.tokens = 0

    def add(self, x_TI: Tensor, where: str) -> None:
        """Take in T inputs. Raises `CheckpointError` for one that is no finite number: a model that overflows cannot be calibrated."""
        x_TI = x_TI.float()
        if not bool(x_TI.isfinite().all()):
            raise CheckpointError(f"the inputs of '{where}' hold NaN or infinities on the calibration text; the checkpoint is damaged")
        self.gram_II.addmm_(x_TI.t(), x_TI)
        self.magnitude_I += x_TI.abs().sum(0)
        self.tokens += len(x_TI)

    @property
    def mean_magnitude_I(self) -> Tensor:
        """Mean |x| per input."""
        return self.magnitude_I / max(1, self.tokens)

    def narrowed(self, factors_I: Tensor) -> "InputStatistics":
        """The statistics of x / s."""
        result = InputStatistics(0)
        result.gram_II = self.gram_II / torch.outer(factors_I, factors_I)
        result.magnitude_I, result.tokens = self.magnitude_I / factors_I, self.tokens
        return result


class ExpertStatistics:
    """What each expert of a layer saw: inputs of its gate|up and of its down, and how many tokens were routed to it."""

    def __init__(self, experts: Experts, least: int) -> None:
        """`least`: an expert with fewer routed tokens is calibrated on all tokens."""
        count, size, inner = experts.down.shape
        self.routed = [0] * count
        self.least = least
        self.everything = InputStatistics(size)
        self.gate_up = [InputStatistics(size) for _ in range(count)]
        self.down = [InputStatistics(inner) for _ in range(count)]

    @property
    def starved(self) -> tuple[int, ...]:
        """Experts that saw fewer than `least` tokens of their own."""
        return tuple(e for e, tokens in enumerate(self.routed) if tokens < self.least)

    def add(self, experts: Experts, x_TD: Tensor, routing: Routing, where: str) -> None:
        """Give every token to the experts it was routed to."""
        self.everything.add(x_TD, where)
        for e in routing.experts.unique().tolist():
            rows = x_TD[(routing.experts == e).any(1)]
            self.routed[e] += len(rows)
            self._give(experts, e, rows, where)

    def add_to_starved(self, experts: Experts, x_TD: Tensor, where: str) -> None:
        """Second pass: give every token to the inner inputs of the starved experts, whose own are forgotten before the first call."""
        for e in self.starved:
            h_TF = ops.swiglu(ops.linear(x_TD, experts.gate_up[e]))
            self.down[e].add(h_TF, f"{where}.down.{e}")

    def forget_starved(self) -> None:
        """Starved experts share the Gram matrix of all tokens and wait for `add_to_starved`."""
        for e in self.starved:
            self.gate_up[e] = self.everything
            self.down[e] = InputStatistics(len(self.down[e].magnitude_I))

    def _give(self, experts: Experts, e: int, rows_TD: Tensor, where: str) -> None:
        self.gate_up[e].add(rows_TD, f"{where}.gate_up.{e}")
        self.down[e].add(ops.swiglu(ops.linear(rows_TD, experts.gate_up[e])), f"{where}.down.{e}")


Statistics = dict[str, InputStatistics | ExpertStatistics]
"""Module name within the block -> what it saw."""


@contextmanager
def watched(block: nn.Module, statistics: Statistics, *, again: bool = False) -> Iterator[None]:
    """While this is open, every pass through `block` adds to `statistics`; with `again` only to the starved experts'."""

    def linear_hook(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found = statistics[name]
            assert isinstance(found, InputStatistics)
            found.add(inputs[0], name)

        return hook

    def experts_hook(name: str) -> object:
        def hook(module: Experts, inputs: tuple[Tensor, Routing]) -> None:
            found = statistics[name]
            assert isinstance(found, ExpertStatistics)
            if again:
                found.add_to_starved(module, inputs[0], name)
            else:
                found.add(module, *inputs, name)

        return hook

    handles = [
        module.register_forward_pre_hook(experts_hook(name) if isinstance(module, Experts) else linear_hook(name))  # pyrefly: ignore
        for name, module in block.named_modules()
        if isinstance(module, Experts) or (isinstance(module, Linear) and not again)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def empty_statistics(block: nn.Module, least_tokens: int) -> Statistics:
    """One entry per `Linear` and `Experts` of the block; `least_tokens` as for `ExpertStatistics`."""
    result: Statistics = {}
    for name, module in block.named_modules():
        if isinstance(module, Linear):
            result[name] = InputStatistics(module.weight.shape[1])
        elif isinstance(module, Experts):
            result[name] = ExpertStatistics(module, least_tokens)
    return result


@torch.inference_mode()
def calibrate(block: nn.Module, x_SLD: Tensor, turns_LP: Tensor, least_tokens: int) -> Statistics:
    """Pass the sequences through the block and return what its matrices saw."""
    statistics = empty_statistics(block, least_tokens)
    with watched(block, statistics):
        for _ in passes(block, x_SLD, turns_LP):
            pass
    starving = [found for found in statistics.values() if isinstance(found, ExpertStatistics) and found.starved]
    for found in starving:
        found.forget_starved()
    if starving:
        with watched(block, statistics, again=True):
            for _ in passes(block, x_SLD, turns_LP):
                pass
    return statistics


def passes(block: nn.Module, x_SLD: Tensor, turns_LP: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The block's output for a few sequences at a time: which they are, and [s, L, D]."""
    length = x_SLD.shape[1]
    for begin in range(0, len(x_SLD), SEQUENCES_AT_ONCE):
        part = x_SLD[begin : begin + SEQUENCES_AT_ONCE]
        count = len(part)
        attend = PackedCausal([length * (i + 1) for i in range(count)])
        y_TD = block(part.flatten(0, 1), turns_LP.repeat(count, 1), attend)
        yield slice(begin, begin + count), y_TD.view_as(part)


@torch.inference_mode()
def advance(block: nn.Module, x_SLD: Tensor, turns_LP: Tensor) -> None:
    """Replace every sequence by the block's output for it, in place."""
    for which, y_SLD in passes(block, x_SLD, turns_LP):
        x_SLD[which] = y_SLD
