"""The vision tower and the resampler: patches of pictures of any size to tokens of the decoder.

Everything is packed: the patches of all pictures and frames lie one behind the other, and a patch sees the patches of its own frame only.
Letters: G grids (pictures or videos), S patches in all, C numbers of one patch, D width of the tower, W joined width (a block of patches
side by side), T tokens of the decoder, Z its width, F frames. Source: ERNIE 4.5 technical report and published modelling files.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.errors import RequestError
from ernie45.models.places import Grid, Places, check_grid, is_placeholder, is_vision, place
from ernie45.models.vision_config import VisionConfig
from ernie45.nn.layers import LayerNorm, Linear, RMSNorm
from ernie45.nn.lora import adapters
from ernie45.nn.rope import inverse_frequencies, turns_of_patches
from ernie45.ops.tower import NativeTowerBlock, TowerMatrix, TowerNorm, TowerWeights, takes

FRAMES = 2
"""Frames that the resampler joins into one; a single picture is joined with itself."""


class Run(NamedTuple):
    """Frames of one size that lie one behind the other, and how their patches turn, complex64 [patches, Q]."""

    frames: int
    turns_PQ: Tensor


class BlockCalls(Protocol):
    """A block in two calls, so that a large frame can be computed in parts: `TowerBlock` itself or its native twin.

    `heads` writes queries, keys and values of patches `first` and on of frames of `patches` into `space`; `rest` gives the block's result
    for the same patches, [G, R, D], once all of their frames are there. Parts begin at multiples of 32.
    """

    def space(self, frames: int, patches: int) -> Tensor: ...

    def heads(self, x_GRD: Tensor, turns_RQ: Tensor, space: Tensor, patches: int, first: int = 0) -> None: ...

    def rest(self, x_GRD: Tensor, space: Tensor, patches: int, first: int = 0) -> Tensor: ...


class TowerAttention(nn.Module):
    """The matrices of attention inside each frame. `qkv` holds the rows of all query heads, then all key heads, then all value heads."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, size // num_heads
        self.qkv = Linear(size, 3 * size, bias=True)
        self.out = Linear(size, size, bias=True)


def _matrix(layer: Linear) -> TowerMatrix:
    assert layer.bias is not None, "every layer of the tower has a bias"
    return TowerMatrix(layer.weight, layer.bias)


class TowerBlock(nn.Module):
    """`h = x + attn(norm(x))`, then `h + down(quick_gelu(up(norm(h))))`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.size, config.norm_eps)
        self.attn = TowerAttention(config.size, config.num_heads)
        self.ffn_norm = LayerNorm(config.size, config.norm_eps)
        self.up = Linear(config.size, config.ffn_size, bias=True)
        self.down = Linear(config.ffn_size, config.size, bias=True)

    def space(self, frames: int, patches: int) -> Tensor:
        """Queries, keys and values of `frames` frames, empty, [G, P, 3N, H]."""
        weight_D, heads = self.attn_norm.weight, self.attn.num_heads
        return torch.empty(frames, patches, 3 * heads, len(weight_D) // heads, dtype=weight_D.dtype, device=weight_D.device)

    def heads(self, x_GRD: Tensor, turns_RQ: Tensor, space: Tensor, patches: int, first: int = 0) -> None:
        """See `BlockCalls`."""
        frames, count, N = *x_GRD.shape[:2], self.attn.num_heads
        heads_SMH = self.attn.qkv(self.attn_norm(x_GRD.flatten(0, 1))).unflatten(1, (3 * N, -1))
        turned_SMH = ops.rotate_halves(heads_SMH[:, : 2 * N], turns_RQ.repeat(frames, 1))
        here = slice(first, first + count)
        space[:, here, : 2 * N] = turned_SMH.unflatten(0, (frames, count))
        space[:, here, 2 * N :] = heads_SMH[:, 2 * N :].unflatten(0, (frames, count))

    def rest(self, x_GRD: Tensor, space: Tensor, patches: int, first: int = 0) -> Tensor:
        """See `BlockCalls`."""
        q_GLNH, k_GLNH, v_GLNH = space.split(self.attn.num_heads, dim=2)
        seen_GRD = ops.framed_attention(q_GLNH[:, first : first + x_GRD.shape[1]], k_GLNH, v_GLNH).flatten(2)
        h_SD = (x_GRD + self.attn.out(seen_GRD.flatten(0, 1)).view_as(x_GRD)).flatten(0, 1)
        return (h_SD + self.down(ops.quick_gelu(self.up(self.ffn_norm(h_SD))))).view_as(x_GRD)

    def calls(self) -> BlockCalls:
        """What computes the block: the kernels where they take it and nobody wants a gradient."""
        if not torch.is_inference_mode_enabled() or ops.KERNELS is None or adapters(self):
            return self
        norms = (TowerNorm(norm.weight, norm.bias, norm.eps) for norm in (self.attn_norm, self.ffn_norm))
        qkv, out, up, down = (_matrix(layer) for layer in (self.attn.qkv, self.attn.out, self.up, self.down))
        block = TowerWeights(self.attn.num_heads, next(norms), qkv, out, next(norms), up, down)
        return NativeTowerBlock(ops.KERNELS, block) if takes(ops.KERNELS, block) else self

    def forward(self, x_SD: Tensor, runs: Sequence[Run]) -> Tensor:
        """[S, D] -> [S, D]."""
        calls, parts = self.calls(), []
        for run, part_RD in zip(runs, x_SD.split([run.frames * len(run.turns_PQ) for run in runs]), strict=True):
            x_GPD, patches = part_RD.unflatten(0, (run.frames, -1)), len(run.turns_PQ)
            space = calls.space(run.frames, patches)
            calls.heads(x_GPD, run.turns_PQ, space, patches)
            parts.append(calls.rest(x_GPD, space, patches).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Tower(nn.Module):
    """Patches to hidden states; rotary positions are row and column inside the frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge = config.merge
        self.frequencies_Q = inverse_frequencies(config.head_size // 2, config.rope_theta)
        self.patches = Linear(config.patch_values, config.size)
        self.blocks = nn.ModuleList(TowerBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.size, config.norm_eps)

    def forward(self, patches_SC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[S, C] -> [S, D]. Frames of one size that follow each other are computed together."""
        x_SD, runs = self.patches(patches_SC), self.runs(grids)
        for block in self.blocks:
            x_SD = block(x_SD, runs)
        return self.norm(x_SD)

    def runs(self, grids: Sequence[Grid]) -> list[Run]:
        """Frames of one size that follow each other, together."""
        sizes = [(size, sum(t for t, _, _ in same)) for size, same in groupby(grids, key=lambda grid: grid[1:])]
        return [Run(frames, turns_of_patches(size, self.merge, self.frequencies_Q)) for size, frames in sizes]


class Joint(nn.Module):
    """Two linear layers with an exact GELU between and a norm behind: how the resampler joins neighbours."""

    def __init__(self, in_size: int, size: int, eps: float) -> None:
        super().__init__()
        self.first = Linear(in_size, size, bias=True)
        self.second = Linear(size, size, bias=True)
        self.norm = LayerNorm(size, eps)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, W]."""
        return self.norm(self.second(nn.functional.gelu(self.first(x_TI))))


class Resampler(nn.Module):
    """A block of patches, then a pair of frames, then the decoder's width."""

    def __init__(self, config: VisionConfig, out_size: int, out_eps: float) -> None:
        super().__init__()
        wide = config.joined_size
        self.block = config.merge**2
        self.spatial = Joint(wide, wide, config.norm_eps)
        self.temporal = Joint(FRAMES * wide, wide, config.norm_eps)
        self.project = Linear(wide, out_size, bias=True)
        self.norm = RMSNorm(out_size, out_eps)

    def forward(self, x_SD: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[S, D] -> [T, Z]: an image gives a token per block of patches, a video one per block and pair of frames."""
        blocks_BW = self.spatial(x_SD.reshape(len(x_SD) // self.block, -1))
        pairs, start = [], 0
        for t, h, w in grids:
            per_frame = h * w // self.block
            frames = blocks_BW[start : start + t * per_frame].view(t, per_frame, -1)
            pairs.append(torch.cat((frames[::FRAMES], frames[1::FRAMES] if t > 1 else frames), dim=-1).flatten(0, 1))
            start += t * per_frame
        return self.norm(self.project(self.temporal(torch.cat(pairs))))


class Sight(nn.Module):
    """Tower and resampler, and which tokens of a prompt they speak for."""

    def __init__(self, config: VisionConfig, out_size: int, out_eps: float) -> None:
        super().__init__()
        self.config = config
        self.tower = Tower(config)
        self.resampler = Resampler(config, out_size, out_eps)

    def forward(self, patches_SC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[S, C] -> [T, Z] in the compute type; patches are normalised, see `Decoder.encode`."""
        return self.resampler(self.tower(patches_SC.to(self.resampler.norm.weight.dtype), grids), grids)

    def encode(self, patches_SC: Tensor, *grids: Sequence[int]) -> Tensor:
        """What the decoder sees in place of placeholder tokens, [T, Z], for one picture or video, or for several one behind the other.

        `patches` is what transformers' processor calls `pixel_values` (or `pixel_values_videos`): per patch a row of `channels *
        patch_size**2` floats, channel by channel and row by row inside it, already divided by 255 and normalised by mean and standard
        deviation; patches in blocks of `merge` x `merge`, frame after frame. `grids` are (frames, rows, columns) of patches, 1 frame for an
        image.
        Raises `RequestError` when rows, columns and grids do not fit each other, or the patches are whole numbers (not normalised).
        """
        checked = [check_grid(grid, self.config) for grid in grids]
        patches_SC = torch.as_tensor(patches_SC, device=self.resampler.norm.weight.device)
        count, needed = sum(t * h * w for t, h, w in checked), self.config.patch_values
        if patches_SC.dim() != 2 or patches_SC.shape != (count, needed):
            raise RequestError(
                f"patches of shape {list(patches_SC.shape)} do not fit the grids {checked}: needed are {count} rows of {needed} numbers",
                field="pixels",
            )
        if not patches_SC.is_floating_point():
            raise RequestError(
                f"patches of type {str(patches_SC.dtype).removeprefix('torch.')} look like pixels as a file has them; divide by 255 and "
                "normalise by mean and standard deviation, as the model's processor does",
                field="pixels",
            )
        return self(patches_SC, checked)

    def positions(self, tokens: Sequence[int], grids: Sequence[Sequence[int]]) -> Places:
        """Where the tokens of a whole prompt stand; see `places.place`. A chunk of a prompt takes its rows, and decoding goes on behind."""
        return place(tokens, [check_grid(grid, self.config) for grid in grids], self.config)

    def is_vision(self, tokens_T: Tensor) -> Tensor:
        """Which tokens go to the vision experts, bool [T], for the decoder's `forward`."""
        return is_vision(tokens_T, self.config)

    def put(self, embedding_TD: Tensor, tokens_T: Tensor, features_FD: Tensor) -> Tensor:
        """The embedding [T, D] of some tokens of a prompt with the rows of their F placeholders replaced by `features`, in order."""
        places_F = torch.nonzero(is_placeholder(tokens_T, self.config)).flatten()
        assert len(places_F) == len(features_FD), f"{len(places_F)} placeholders and {len(features_FD)} features"
        return embedding_TD.index_copy(0, places_F, features_FD)
