"""The vision tower in pieces, so that a step of an engine need not wait for a whole picture.

A picture of 1080 lines is ten thousand patches, and one block of a real tower over them takes seconds on a CPU. Here the same modules are
called for some rows at a time: keys and values of all rows first, then attention and feed-forward for rows of one frame, or of a few.
Letters: S patches of all frames, P of one frame, R rows of one piece, D width of the tower, C numbers of one patch, B blocks of patches,
T tokens, Z width of the decoder, N heads, M = 3 N, H head size, Q angles.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.models.places import Grid
from ernie45.models.vision import Resampler, Sight, TowerBlock
from ernie45.nn.rope import turns_of_patches

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
        yield from _block(block, x_SD, turns_PQ, frames, rows)
    for part in _slices(len(x_SD), rows):
        x_SD[part] = tower.norm(x_SD[part])
    return (yield from _resample(sight.resampler, x_SD.view(frames, size, -1), rows))


def _block(block: TowerBlock, x_SD: Tensor, turns_PQ: Tensor, frames: int, rows: int) -> Generator[int]:
    """One block, in place."""
    S, D = x_SD.shape
    P, N = S // frames, block.attn.num_heads
    heads_SMH = torch.empty(S, 3 * N, D // N, dtype=x_SD.dtype)
    for frame, part in _frame_parts(frames, P, rows):
        here = slice(frame * P + part.start, frame * P + part.stop)
        heads_RMH = block.attn.qkv(block.attn_norm(x_SD[here])).view(here.stop - here.start, 3 * N, -1)
        turns_RQ = turns_PQ[part] if part.stop <= P else turns_PQ.repeat(part.stop // P, 1)
        heads_SMH[here, : 2 * N] = ops.rotate_halves(heads_RMH[:, : 2 * N], turns_RQ)
        heads_SMH[here, 2 * N :] = heads_RMH[:, 2 * N :]
        yield 3 * len(heads_RMH) * D * D
    q_SNH, k_SNH, v_SNH = heads_SMH.split(N, dim=1)
    for frame, part in _frame_parts(frames, P, rows):
        count = max(1, part.stop // P)  # whole frames, or a part of one
        here = slice(frame * P + part.start, frame * P + part.stop)
        whole = slice(frame * P, (frame + count) * P)
        framed = (q_SNH[here], k_SNH[whole], v_SNH[whole])
        seen_RD = ops.framed_attention(*(x.unflatten(0, (count, -1)) for x in framed)).reshape(here.stop - here.start, D)
        h_RD = x_SD[here] + block.attn.out(seen_RD)
        x_SD[here] = h_RD + block.down(ops.quick_gelu(block.up(block.ffn_norm(h_RD))))
        yield len(h_RD) * D * (2 * P + D + 2 * block.up.weight.shape[0])


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


def _frame_parts(frames: int, size: int, rows: int) -> Iterator[tuple[int, slice]]:
    """Frame number and rows counted from its beginning: parts of a large frame, or several small frames at once."""
    if size > rows:
        yield from ((frame, part) for frame in range(frames) for part in _slices(size, rows))
        return
    for part in _slices(frames, max(1, rows // size)):
        yield part.start, slice(0, (part.stop - part.start) * size)


def _slices(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
