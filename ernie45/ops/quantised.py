"""Quantised products written plainly: what the native kernels compute, and what runs where they are not installed.

Weights are packed once, when a checkpoint is written, in the order the kernels read. For a matrix [O, I] (O rounded up to 16 rows with
zeros, I to a whole number of groups):

    packed, 4 bits   uint8 [O/16, I/8, 64]: byte 4r + c of block (b, j) holds row 16b + r, input 8j + c low and 8j + 4 + c high, each + 8
    packed, 8 bits   uint8 [O/16, I/4, 64]: byte 4r + c of block (b, j) holds row 16b + r, input 4j + c, + 128
    scale            float16 [O/16, G, 16]

Activations become whole numbers of -127 .. 127 per row and group of inputs, with one float32 scale each; sums of products are exact, and
`out = sum over groups of weight_scale * activation_scale * whole`, groups in order, in float32.

With `float_inputs` activations stay as they are: each group's sum of whole numbers times float32 activations, then its scale.

Where `hadamard` is set, the matrix was turned before it was rounded: every 64 inputs (32 where groups have 32) by the orthogonal Hadamard
matrix, and activations are turned the same way before they become whole numbers. The product is the same, and a few large inputs no longer
set the scale of their group alone.

Letters: T tokens, I and O in- and output widths, G groups of inputs, D width, F feed-forward width, N query heads, K key heads, H head
size, P = H / 2 pairs, B sequences, S keys in sight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.ops import reference


class PackedWeight(NamedTuple):
    """A packed matrix: `values` and `scales` as above, `bits` 4 or 8, `out_size` the rows that exist, `hadamard` whether it is turned,
    `float_inputs` whether activations stay as they are.
    """

    values: Tensor
    scales: Tensor
    bits: int
    out_size: int
    hadamard: bool = False
    float_inputs: bool = False

    @property
    def format(self) -> int:
        """Bits, turn and kind of inputs as one number, for the kernels."""
        return self.bits + 16 * self.hadamard + 32 * self.float_inputs

    @property
    def padded_in(self) -> int:
        """Inputs, rounded up to whole groups."""
        return self.values.shape[1] * 32 // self.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.padded_in // self.scales.shape[1]


def turn_by_hadamard(x_TI: Tensor, group: int) -> Tensor:
    """Every 64 inputs (32 where groups have 32) times the symmetric orthogonal Hadamard matrix; twice is no turn at all.

    Sums and differences of elements 1, 2, 4, .. apart, as the kernels order them: both round alike.
    """
    size = hadamard_size(group)
    step, turned = 1, x_TI
    while step < size:
        low, high = turned.unflatten(1, (-1, 2, step)).unbind(2)
        turned = torch.stack((low + high, low - high), dim=2).flatten(1)
        step *= 2
    return turned * size**-0.5


def hadamard(size: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix, float32 [size, size]; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def hadamard_size(group: int) -> int:
    """Inputs that are turned together."""
    return 64 if group % 64 == 0 else 32


def unpack(weight: PackedWeight) -> Tensor:
    """The whole numbers of a packed matrix, int8 [O, I padded]."""
    blocks, quads, _ = weight.values.shape
    if weight.bits == 8:
        whole = (weight.values.to(torch.int16) - 128).view(blocks, quads, 16, 4)
        rows = whole.permute(0, 2, 1, 3)
    else:
        nibbles = torch.stack((weight.values & 15, weight.values >> 4), dim=2)  # [blocks, I / 8, 2, 64]
        rows = (nibbles.to(torch.int16) - 8).view(blocks, quads, 2, 16, 4).permute(0, 3, 1, 2, 4)
    return rows.reshape(blocks * 16, -1)[: weight.out_size].to(torch.int8)


def dequantise(weight: PackedWeight) -> Tensor:
    """The matrix that the packed one stands for, turned back, float32 [O, I padded]."""
    scales_OG = weight.scales.float().transpose(1, 2).reshape(-1, weight.scales.shape[1])[: weight.out_size]
    matrix_OI = (unpack(weight).float().unflatten(1, (-1, weight.group)) * scales_OG[:, :, None]).flatten(1)
    return turn_by_hadamard(matrix_OI, weight.group) if weight.hadamard else matrix_OI


def dequantise_rows(weight: PackedWeight, rows_T: Tensor) -> Tensor:
    """Rows of the matrix by number, [T] int64 -> float32 [T, I padded]: an embedding kept packed."""
    block_T, lane_T = rows_T // 16, rows_T % 16
    values = weight.values.view(*weight.values.shape[:2], 16, 4)[block_T, :, lane_T]  # [T, I / 8 or I / 4, 4]
    if weight.bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=2)
    whole_TI = values.flatten(1).float() - (8 if weight.bits == 4 else 128)
    scales_TG = weight.scales[block_T, :, lane_T].float()
    rows_TI = (whole_TI.unflatten(1, (-1, weight.group)) * scales_TG[:, :, None]).flatten(1)
    return turn_by_hadamard(rows_TI, weight.group) if weight.hadamard else rows_TI


def quantise_activations(x_TI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Whole numbers int8 [T, G, group] and float32 scales [T, G]; the last group is filled up with zeros.

    A group that holds a value that is no finite number gets the scale NaN, so that nothing computed from it looks sound.
    """
    padded = torch.nn.functional.pad(x_TI.float(), (0, -x_TI.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.abs().amax(-1, keepdim=True)
    sound = largest.isfinite() & (largest >= 1e-30)
    # a true division: torch turns "number / tensor" into a product with the reciprocal, which rounds twice and moves ties
    inverse = torch.where(sound, torch.full_like(largest, 127.0) / largest, 0.0)
    whole = torch.where(sound, (padded * inverse).round(), 0.0).to(torch.int8)
    scales = torch.where(sound, largest / 127.0, torch.where(largest.isfinite(), 0.0, float("nan")))
    return whole, scales.squeeze(-1)


def packed_linear(x_TI: Tensor, weight: PackedWeight) -> Tensor:
    """`x @ weight.T`, activations quantised unless the weight takes floats, [T, I] -> [T, O] in the type of `x`."""
    inputs_TI = torch.nn.functional.pad(x_TI.float(), (0, weight.padded_in - x_TI.shape[1]))
    if weight.hadamard:
        inputs_TI = turn_by_hadamard(inputs_TI, weight.group)
    if weight.float_inputs:
        return (inputs_TI.double() @ dequantise(weight._replace(hadamard=False)).double().t()).to(x_TI.dtype)
    whole, scales_TG = quantise_activations(inputs_TI, weight.group)
    # float64 holds every sum of products exactly, and the last sum is rounded once: the kernels round it in float32, once a group
    weight_OGI = unpack(weight).double().unflatten(1, (-1, weight.group))
    sums_GTO = torch.bmm(whole.double().transpose(0, 1), weight_OGI.permute(1, 2, 0))
    weight_scales_GO = weight.scales.double().transpose(0, 1).flatten(1)[:, : weight.out_size]
    scaled = sums_GTO * scales_TG.double().t()[:, :, None] * weight_scales_GO[:, None, :]
    return scaled.sum(0).to(x_TI.dtype)


def norm_packed_linear(x_TD: Tensor, norm_D: Tensor, eps: float, weight: PackedWeight) -> Tensor:
    """`packed_linear` of the normed `x`."""
    return packed_linear(reference.rms_norm(x_TD, norm_D, eps), weight)


def packed_qkv(
    x_TD: Tensor, norm_D: Tensor, eps: float, weight: PackedWeight, turns_TP: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, one product and rotation: queries [T, N, H], keys and values [T, K, H] each; `turns` is complex64 [T, P]."""
    heads = norm_packed_linear(x_TD, norm_D, eps, weight).unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return reference.rotate_pairs(q, turns_TP), reference.rotate_pairs(k, turns_TP), v


def packed_linear_add(x_TI: Tensor, weight: PackedWeight, addend_TO: Tensor) -> Tensor:
    """`addend + x @ weight.T`."""
    return addend_TO + packed_linear(x_TI, weight)


def packed_swiglu(x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """`down(swiglu(gate_up(x)))`, [T, D] -> [T, D]: one expert."""
    return packed_linear(reference.swiglu(packed_linear(x_TD, gate_up)), down)


def packed_feed_forward(x_TD: Tensor, norm_D: Tensor, eps: float, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
    """`x + down(swiglu(gate_up(norm(x))))`, [T, D] -> [T, D]."""
    return x_TD + packed_linear(reference.swiglu(norm_packed_linear(x_TD, norm_D, eps, gate_up)), down)


def paged_attention(q_BNH: Tensor, keys: Tensor, values: Tensor, pages_BP: Tensor, lengths_B: Tensor, page_size: int) -> Tensor:
    """One query per sequence over the keys in its pages, [B, N, H] -> [B, N, H].

    `keys` and `values` are [slots, K, H]; page p holds slots p * page_size and on. Sequence b sees its first `lengths[b]` keys.
    """
    out = []
    for q_NH, pages_P, length in zip(q_BNH, pages_BP, lengths_B.tolist(), strict=True):
        slots_S = (pages_P[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        out.append(reference.causal_attention(q_NH[None], keys[slots_S].to(q_NH.dtype), values[slots_S].to(q_NH.dtype)))
    return torch.cat(out)
