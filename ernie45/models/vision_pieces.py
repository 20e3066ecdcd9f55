"""The vision tower in pieces, so that a step of an engine need not wait for a whole picture.

A picture of 1080 lines is ten thousand patches, and one block of a real tower over them takes seconds on a CPU. Here the same modules are
called for some rows at a time: keys and values of all rows first, then attention and feed-forward for rows of one frame, or of a few.
Letters: S patches of all frames, G frames, P patches of one, D width of the tower, C numbers of one patch, B blocks of patches, T tokens,
Z width of the decoder, Q angles.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ernie45.models.places import Grid
from ernie45.models.vision import Resampler, Sight, TowerBlock
from ernie45.nn.rope import turns_of_patches
from ernie45.ops.tower import FRAME_PADDING

ROWS = 1024
"""Patches of one piece."""

Pieces = Generator[int, None, Tensor]
"""Yields what each piece cost, in multiplications, and returns the result."""


def encode_in_pieces(sight: Sight, patches_SC: Tensor, grid: Grid, rows: int = ROWS) -> Pieces:
    """As `Sight.encode` of one picture or video, [S, C] -> [T, Z], in pieces of about `rows` patches. The grid fits the patches."""
    frames, down, across = grid
    tower, size = sight.tower, down * across
    turns_PQ = turns_of_patches((down, across), tower.merge, tower.frequencies_Q)
    parts = []
    for part in _slices(len(patches_SC), rows):
        parts.append(tower.patches(patches_SC[part].to(sight.resampler.norm.weight.dtype)))
        yield patches_SC[part].numel() * parts[0].shape[1]
    x_SD = torch.cat(parts)
    for block in tower.blocks:
        assert isinstance(block, TowerBlock)
        yield from _block(block, x_SD.view(frames, size, -1), turns_PQ, rows)
    for part in _slices(len(x_SD), rows):
        x_SD[part] = tower.norm(x_SD[part])
    return (yield from _resample(sight.resampler, x_SD.view(frames, size, -1), rows))


def _block(block: TowerBlock, x_GPD: Tensor, turns_PQ: Tensor, rows: int) -> Generator[int]:
    """One block, in place."""
    frames, P, D = x_GPD.shape
    calls = block.calls()
    space, inner = calls.space(frames, P), block.up.out_size
    for some, part in _frame_parts(frames, P, rows):
        calls.heads(x_GPD[some, part], turns_PQ[part], space[some], P, part.start)
        yield 3 * x_GPD[some, part].numel() * D
    for some, part in _frame_parts(frames, P, rows):
        x_GPD[some, part] = calls.rest(x_GPD[some, part], space[some], P, part.start)
        yield x_GPD[some, part].numel() * (2 * P + D + 2 * inner)


def _resample(resampler: Resampler, x_FPD: Tensor, rows: int) -> Pieces:
    """Frames [F, P, D] to tokens [T, Z]; a single frame is its own neighbour."""
    frames, P, D = x_FPD.shape
    blocks_FBW = x_FPD.reshape(frames, P // resampler.block, resampler.block * D)
    width = blocks_FBW.shape[2]
    found = []
    for first in range(0, frames, 2):
        for part in _slices(blocks_FBW.shape[1], max(1, rows // resampler.block)):
            one = resampler.spatial(blocks_FBW[first, part])
            other = one if frames == 1 else resampler.spatial(blocks_FBW[first + 1, part])
            found.append(resampler.norm(resampler.project(resampler.temporal(torch.cat((one, other), dim=-1)))))
            yield len(one) * width * (width * (7 if frames > 1 else 5) + found[0].shape[1])
    return torch.cat(found)


def _frame_parts(frames: int, size: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Frames, and patches of each: parts of a large frame, which begin at multiples of 32, or several small frames at once."""
    if size > rows:
        step = -(-rows // FRAME_PADDING) * FRAME_PADDING
        yield from ((slice(frame, frame + 1), part) for frame in range(frames) for part in _slices(size, step))
        return
    for some in _slices(frames, max(1, rows // size)):
        yield some, slice(0, size)


def _slices(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
