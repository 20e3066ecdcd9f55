"""Floating-point operations of a training step, counted for the parameters that a token really meets.

A product with a matrix of N numbers costs a token 2 N in the forward pass and 2 N for the gradient of its input; the gradient of the matrix
costs 2 N more where it learns. Of a mixture of experts only the chosen ones count, of the head only rows with a label, of attention only
pairs of tokens that see each other: 4 Q operations a pair and layer forward (Q the width of all query heads), twice that backward. Norms,
softmax and sorting are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ernie45.models.config import TextConfig
from ernie45.models.counts import count_parameters


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a step learned from, of all ranks: tokens, pairs of tokens that see each other, rows with a label, and of the predictor."""

    tokens: int
    pairs: int
    head_rows: int
    mtp_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations: of the step, and of one forward pass of the layers in it, which is what computing them again costs at most.

    (torch may leave out the last product of what it computes again, when backward does not need its result.)
    """

    step: float
    layers: float


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs (token, earlier token or itself) of documents of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_work(config: TextConfig, step: Learned, *, weights_learn: bool = True) -> Work:
    """The work of one step. weights_learn: all matrices learn, or none of them but adapters, which are too small to count."""
    counts = count_parameters(config)
    matrices = 2 * (counts.active - counts.norms) * step.tokens
    attention = 4 * config.query_size * config.num_layers * step.pairs
    head = 2 * config.vocab_size * config.hidden_size * (step.head_rows + step.mtp_rows)
    block = 2 * counts.mtp * step.tokens if step.mtp_rows else 0
    seen = 4 * config.query_size * step.pairs if step.mtp_rows else 0
    passes = 3 if weights_learn else 2
    return Work(step=float(passes * (matrices + head + block) + 3 * (attention + seen)), layers=float(matrices + attention))
