"""Where tokens stand: three positions a token for prompts with pictures and videos, and which tokens stand for what was seen.

A text token, marker or not, has one number three times. The tokens of a picture share their time and count rows and columns from there;
those of a video count pairs of frames too. Behind it, numbering goes on at the highest position so far plus one. transformers (5.23) goes
on behind rows and columns alone, so that the text after a long video stands at times inside the video; `VisionConfig.position_rule` can
ask for that. Source: the published processor. Letters: T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.errors import RequestError
from ernie45.models.vision_config import VisionConfig

Grid = tuple[int, int, int]
"""Frames, and rows and columns of patches in each. One frame is an image; the frames of a video come in pairs."""


class Places(NamedTuple):
    """Positions int64 [T, 3] (time, row, column), and the one of the next token, which stands behind all of them."""

    positions_T3: Tensor
    following: int


def check_grid(grid: Sequence[int], vision: VisionConfig) -> Grid:
    """The grid as a tuple. Raises `RequestError` for one that no picture of this model has."""
    if len(grid) != 3 or min(grid) < 1 or (grid[0] > 1 and grid[0] % 2) or grid[1] % vision.merge or grid[2] % vision.merge:
        raise RequestError(
            f"the grid {tuple(grid)} is no picture's: it is (frames, rows, columns) of patches, with 1 frame for an image or an even "
            f"number for a video, and rows and columns that are multiples of {vision.merge}",
            field="pixels",
        )
    return (int(grid[0]), int(grid[1]), int(grid[2]))


def tokens_of(grid: Grid, vision: VisionConfig) -> int:
    """How many placeholder tokens a picture or video takes in the prompt."""
    return _seen_size(grid, vision)[0] * _seen_size(grid, vision)[1] * _seen_size(grid, vision)[2]


def place(tokens: Sequence[int], grids: Sequence[Grid], vision: VisionConfig) -> Places:
    """Positions of a whole prompt whose placeholders stand for `grids`, in order.

    Raises `RequestError` when placeholders and grids do not meet: too few or too many, or a picture interrupted by other tokens.
    """
    parts, at, following, left = [], 0, 0, list(grids)
    while at < len(tokens):
        start = at
        while at < len(tokens) and tokens[at] not in vision.placeholder_ids:
            at += 1
        if at > start:
            parts.append(torch.arange(following, following + at - start)[:, None].expand(-1, 3))
            following += at - start
        if at == len(tokens):
            break
        if not left:
            raise RequestError(f"the token at place {at} stands for a picture, and there are only {len(grids)}", field="pixels")
        size = _seen_size(left.pop(0), vision)
        count = size[0] * size[1] * size[2]
        if at + count > len(tokens) or any(token not in vision.placeholder_ids for token in tokens[at : at + count]):
            raise RequestError(
                f"picture {len(grids) - len(left)} takes {count} placeholder tokens, and from place {at} on the prompt has fewer",
                field="pixels",
            )
        parts.append(torch.cartesian_prod(*(torch.arange(extent) for extent in size)) + following)
        following += max(size if vision.position_rule == "original" else size[1:])
        at += count
    if left:
        raise RequestError(f"there are {len(grids)} pictures, and the prompt has placeholders for {len(grids) - len(left)}", field="pixels")
    positions_T3 = torch.cat(parts)
    return Places(positions_T3, int(positions_T3.max()) + 1)


def is_vision(tokens_T: Tensor, vision: VisionConfig) -> Tensor:
    """Which tokens go to the vision experts: placeholders and the markers around them, bool [T]."""
    return torch.isin(tokens_T, torch.tensor(sorted(vision.vision_ids), device=tokens_T.device))


def is_placeholder(tokens_T: Tensor, vision: VisionConfig) -> Tensor:
    """Which tokens stand for something seen, bool [T]."""
    return torch.isin(tokens_T, torch.tensor(sorted(vision.placeholder_ids), device=tokens_T.device))


def _seen_size(grid: Grid, vision: VisionConfig) -> tuple[int, int, int]:
    """Tokens along time, rows and columns."""
    frames, rows, columns = grid
    return max(1, frames // 2), rows // vision.merge, columns // vision.merge
