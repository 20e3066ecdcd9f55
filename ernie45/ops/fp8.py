"""FP8 numbers (E4M3: 4 bits of exponent, 3 of mantissa, largest 448, no infinities) with a float32 scale per block of a matrix.

Serving and training share them. A matrix is cut into blocks of `rows` x `columns`, cut off at its edges; each is divided by its scale,
largest magnitude over 448, and rounded to the nearest number, ties to even (OCP 8-bit floating point specification 1.0). Weights usually
have blocks of 128 x 128 and activations of 1 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3); a block may be a whole row or matrix.

Letters: T tokens, I and O in- and output widths, R and C rows and columns of a matrix, B and D its blocks down and across.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-30  # of a block of zeros, and so small that no block of sound weights has it


class Block(NamedTuple):
    """Rows and columns that share a scale; 0 stands for all of them."""

    rows: int
    columns: int

    def of(self, matrix_RC: Tensor) -> tuple[int, int]:
        """The extents for one matrix."""
        return self.rows or max(1, matrix_RC.shape[0]), self.columns or max(1, matrix_RC.shape[1])


WEIGHT_BLOCK, INPUT_BLOCK = Block(128, 128), Block(1, 128)
ROW, WHOLE = Block(1, 0), Block(0, 0)


class Fp8Matrix(NamedTuple):
    """`values` [R, C] of type E4M3 and float32 `scales` [B, D]: what they stand for is `values * scale of their block`."""

    values: Tensor
    scales: Tensor
    block: Block


def to_fp8(matrix_RC: Tensor, block: Block) -> Fp8Matrix:
    """Round a matrix to E4M3. A block that holds NaN or an infinity gets the scale NaN: nothing computed from it looks sound."""
    rows, columns = block.of(matrix_RC)
    R, C = matrix_RC.shape
    padded = torch.nn.functional.pad(matrix_RC.float(), (0, -C % columns, 0, -R % rows))
    tiles_BRDC = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest_BD = tiles_BRDC.abs().amax((1, 3))
    scales_BD = torch.where(largest_BD.isfinite(), (largest_BD / E4M3_MAX).clamp(min=SMALLEST_SCALE), torch.nan)
    return Fp8Matrix(with_scale(matrix_RC, spread(scales_BD, block, matrix_RC)), scales_BD, block)


def with_scale(matrix_RC: Tensor, scale: Tensor) -> Tensor:
    """E4M3 numbers of `matrix / scale`; what lies beyond the largest number becomes it, as a static scale demands."""
    return (matrix_RC.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def spread(scales_BD: Tensor, block: Block, matrix_RC: Tensor) -> Tensor:
    """The scale of every element, [R, C] or what broadcasts to it."""
    rows, columns = block.of(matrix_RC)
    R, C = matrix_RC.shape
    if rows > 1:
        scales_BD = scales_BD if len(scales_BD) == 1 else scales_BD.repeat_interleave(rows, 0)[:R]
    return scales_BD if scales_BD.shape[1] == 1 else scales_BD.repeat_interleave(columns, 1)[:, :C]


def from_fp8(matrix: Fp8Matrix) -> Tensor:
    """The float32 matrix that stands behind the numbers."""
    return matrix.values.float() * spread(matrix.scales, matrix.block, matrix.values)


def fp8_inputs(x_TI: Tensor, block: Block, static_scale: Tensor | None = None) -> Fp8Matrix:
    """Activations as E4M3: by `block` (1 x 128, or 1 x all), or under one `static_scale` measured beforehand."""
    if static_scale is None:
        return to_fp8(x_TI, block)
    values = with_scale(x_TI, static_scale)
    return Fp8Matrix(values, static_scale.float().view(1, 1), WHOLE)


def turned_over(matrix: Fp8Matrix) -> Fp8Matrix:
    """The transposed matrix, with the same numbers and scales."""
    return Fp8Matrix(matrix.values.t(), matrix.scales.t(), Block(matrix.block.columns, matrix.block.rows))


def fp8_linear(inputs: Fp8Matrix, weight: Fp8Matrix) -> Tensor:
    """`x @ weight.T` of E4M3 matrices, float32 [T, O]: products exact, summed in float32, scales of weight and inputs applied.

    On the CPU by multiplying what the numbers stand for. On a GPU with FP8 units by its scaled product: scales by row or matrix from
    compute capability 8.9, whole blocks of 128 on 9.0; other shapes go the CPU's way there too. No GPU path was ever run: no such machine
    was at hand.
    """
    if inputs.values.is_cuda:
        capability = torch.cuda.get_device_capability(inputs.values.device)
        if capability >= (8, 9) and inputs.block in (ROW, WHOLE) and weight.block in (ROW, WHOLE):
            T, O = len(inputs.values), len(weight.values)  # noqa: E741
            scales = inputs.scales.expand(T, 1).contiguous(), weight.scales.expand(O, 1).t().contiguous()
            values = inputs.values.contiguous(), weight.values.contiguous().t()
            return torch._scaled_mm(*values, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16).float()
        if capability == (9, 0) and inputs.block in _BLOCKWISE and weight.block in _BLOCKWISE and _whole_blocks(inputs, weight):
            return _blockwise(inputs, weight).float()
    return from_fp8(inputs) @ from_fp8(weight).t()


_BLOCKWISE = {INPUT_BLOCK: ScalingType.BlockWise1x128, WEIGHT_BLOCK: ScalingType.BlockWise128x128}


def _whole_blocks(*matrices: Fp8Matrix) -> bool:
    return all(extent % 128 == 0 for matrix in matrices for extent in matrix.values.shape)


def _blockwise(inputs: Fp8Matrix, weight: Fp8Matrix) -> Tensor:
    """The product by the units of a GPU, bfloat16 [T, O]. Never run."""
    laid = []
    for matrix in (inputs, weight):
        if matrix.block == INPUT_BLOCK:  # the scales of a column lie side by side
            laid.append(matrix.scales.t().contiguous().t())
        else:  # filled up to four across, and turned over
            laid.append(torch.nn.functional.pad(matrix.scales, (0, -matrix.scales.shape[1] % 4)).contiguous().t())
    return scaled_mm(
        inputs.values.contiguous(),
        weight.values.contiguous().t(),
        laid[0],
        _BLOCKWISE[inputs.block],
        laid[1],
        _BLOCKWISE[weight.block],
        output_dtype=torch.bfloat16,
    )
