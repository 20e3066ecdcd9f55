"""What a rank would hold of a model that is split by `models.layout`: numbers and bytes of each stage, and how every tensor is cut.

Bytes are of what stays: weights, and where they learn gradients and optimiser. What is under way between ranks and layers comes on top.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ernie45.models.layout import Layout, cuts_of, own_shape, stages, stages_of, token_spans
from ernie45.models.vision_config import ModelConfig
from ernie45.weights.rename import fold_names


class Weight(NamedTuple):
    """A tensor of the whole model, and the bytes that one of its numbers takes with all that belongs to it."""

    name: str
    shape: tuple[int, ...]
    bytes_each: int


class Stage(NamedTuple):
    """What each rank of a pipeline stage holds."""

    layers: range
    numbers: int
    bytes: int


def split(weights: Iterable[Weight], config: ModelConfig, layout: Layout) -> list[Stage]:
    """The stages in order. Raises ConfigError where the layout does not suit the model."""
    found = [Stage(layers, 0, 0) for layers in stages(config.text.num_layers, layout.pipeline)]
    for weight in weights:
        own = math.prod(own_shape(weight.name, weight.shape, config, layout))
        for at in stages_of(weight.name, config, layout.pipeline):
            stage = found[at]
            found[at] = stage._replace(numbers=stage.numbers + own, bytes=stage.bytes + own * weight.bytes_each)
    return found


def split_text(weights: Sequence[Weight], config: ModelConfig, layout: Layout, tokens: int) -> str:
    """The split for people: ranks, stages, tokens of a row of so many, and the tensors that are cut. Raises ConfigError as `split`."""
    axes = " x ".join(f"{name} {getattr(layout, name)}" for name in ("tensor", "expert", "pipeline", "context"))
    lines = [f"layout: {axes} = {layout.ranks:,} ranks for one copy of the model"]
    for n, stage in enumerate(split(weights, config, layout)):
        where = f"layers {stage.layers[0]} to {stage.layers[-1]}"
        lines.append(
            f"  stage {n + 1} of {layout.pipeline}, {where}: {stage.numbers:,} parameters, {stage.bytes / 1e9:.2f} GB on each rank"
        )
    if layout.context > 1:
        (first, second), (third, end) = token_spans(tokens, layout.context, 0)
        lines.append(f"  of a row of {tokens:,} tokens the first rank has {first} to {second - 1} and {third} to {end - 1}")
    return "\n".join([*lines, *_cut_lines(weights, config, layout)])


def _cut_lines(weights: Iterable[Weight], config: ModelConfig, layout: Layout) -> list[str]:
    """A line for the tensors that are cut in the same way."""
    alike: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[str]] = {}
    for weight in weights:
        own = own_shape(weight.name, weight.shape, config, layout)
        if own != weight.shape:
            by = ", ".join(f"{cut.axis} along {cut.dim}" for cut in cuts_of(weight.name, config) if getattr(layout, cut.axis) > 1)
            alike.setdefault((weight.shape, own, by), []).append(weight.name)
    return [f"  {name}: {list(shape)} -> {list(own)} ({by})" for (shape, own, by), names in alike.items() for name, _ in fold_names(names)]
