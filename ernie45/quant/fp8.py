"""Modules whose weights and activations are FP8 numbers (E4M3). The numbers and products stand in `ops/fp8.py`.

On a CPU their products are emulated exactly, in float32: for measuring and for checkpoints that run elsewhere, not for speed. Letters as in
`quant.linear`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.errors import CheckpointError, ConfigError
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Experts
from ernie45.ops import Routing
from ernie45.ops.fp8 import (
    E4M3,
    E4M3_MAX,
    INPUT_BLOCK,
    ROW,
    WEIGHT_BLOCK,
    WHOLE,
    Block,
    Fp8Matrix,
    fp8_inputs,
    fp8_linear,
    from_fp8,
    to_fp8,
)
from ernie45.quant.hadamard import turned, turned_back
from ernie45.quant.spec import Fp8Scheme


class Fp8Weight(NamedTuple):
    """A matrix of FP8 numbers, and float32 [1], the one scale of what it reads; None where activations get theirs as they come."""

    matrix: Fp8Matrix
    input_scale: Tensor | None


def weight_block(scheme: Fp8Scheme) -> Block:
    """What of a weight shares a scale."""
    return {"block": WEIGHT_BLOCK, "channel": ROW, "tensor": WHOLE}[scheme.weights]


def input_block(scheme: Fp8Scheme) -> Block:
    """What of the activations shares a scale that is found while running."""
    return INPUT_BLOCK if scheme.weights == "block" else ROW


def round_to_fp8(weight_OI: Tensor, scheme: Fp8Scheme, largest_input: float | None) -> Fp8Weight:
    """Round a matrix to nearest. `largest_input`: the largest magnitude it was seen to read, for static activations.

    Raises `CheckpointError` for weights that are no numbers, `ConfigError` where a static scale is asked for and nothing was seen.
    """
    if not bool(weight_OI.isfinite().all()):
        raise CheckpointError("a weight holds NaN or infinities and cannot be quantised; the checkpoint is damaged")
    if scheme.static and scheme.hadamard:
        raise ConfigError(f"{scheme} is what training through the rounding gives (ernie sft --qat {scheme}); leave -h or -static out here")
    if scheme.static and largest_input is None:
        raise ConfigError(
            f"{scheme} needs activations to be measured, and no calibration text passed this matrix; take fp8-{scheme.weights}"
        )
    check_turn(scheme, weight_OI.shape[1])
    scale = torch.tensor([(largest_input or 1.0) / E4M3_MAX]) if scheme.static else None
    return Fp8Weight(to_fp8(turned(weight_OI.detach().float(), scheme), weight_block(scheme)), scale)


def check_turn(scheme: Fp8Scheme, in_size: int) -> None:
    """Raise `ConfigError` where inputs are to be turned that are no whole groups."""
    if scheme.hadamard and in_size % scheme.group:
        raise ConfigError(f"{scheme} turns {scheme.group} inputs at a time, and a matrix has {in_size}; leave -h out")


def apply(x_TI: Tensor, weight: Fp8Weight, scheme: Fp8Scheme) -> Tensor:
    """`x @ weight.T` with both as FP8 numbers, in the type of `x`."""
    inputs_TI = turned(x_TI.float(), scheme)
    return fp8_linear(fp8_inputs(inputs_TI, input_block(scheme), weight.input_scale), weight.matrix).to(x_TI.dtype)


def restored_from_fp8(matrix: Fp8Matrix, scheme: Fp8Scheme) -> Tensor:
    """The float32 matrix [O, I] that `round_to_fp8` was given, as it was rounded."""
    return turned_back(from_fp8(matrix), scheme, matrix.values.shape[1])


class Fp8Linear(nn.Module):
    """`x @ weight.T + bias`: `weight_fp8` [O, I], `weight_fp8_scale` by blocks, and `input_fp8_scale` [1] where activations are static."""

    def __init__(self, in_size: int, out_size: int, scheme: Fp8Scheme, *, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_size, self.out_size, self.scheme = in_size, out_size, scheme
        self.register_buffer("weight_fp8", torch.empty(out_size, in_size, dtype=E4M3))
        self.register_buffer("weight_fp8_scale", torch.empty(scheme.scales(out_size, in_size)))
        self.register_buffer("input_fp8_scale", torch.empty(1) if scheme.static else None)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def weight(self) -> Fp8Weight:
        """The matrix with its scales."""
        return Fp8Weight(Fp8Matrix(self.weight_fp8, self.weight_fp8_scale, weight_block(self.scheme)), self.input_fp8_scale)

    def fill(self, weight: Fp8Weight) -> None:
        """Take the tensors of `weight`, without a copy."""
        assert weight.matrix.values.shape == self.weight_fp8.shape, "the FP8 weight belongs to another matrix"
        self.weight_fp8, self.weight_fp8_scale, self.input_fp8_scale = weight.matrix.values, weight.matrix.scales, weight.input_scale

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = apply(x_TI, self.weight, self.scheme)
        return out_TO if self.bias is None else out_TO + self.bias

    def whole(self, dtype: torch.dtype) -> Linear:
        """The float layer whose weight the numbers stand for."""
        made = Linear(self.in_size, self.out_size)
        made.weight, made.bias = nn.Parameter(restored_from_fp8(self.weight.matrix, self.scheme).to(dtype)), self.bias
        return made

    def extra_repr(self) -> str:
        """Sizes for printing."""
        return f"{self.in_size} -> {self.out_size}, {self.scheme}"


class Fp8Experts(nn.Module):
    """E SwiGLUs: `gate_up_fp8` [E, 2F, D] and `down_fp8` [E, D, F] with scales, and the scales [E] of what they read where static."""

    def __init__(self, num_experts: int, size: int, expert_size: int, scheme: Fp8Scheme) -> None:
        super().__init__()
        self.num_experts, self.size, self.expert_size, self.scheme = num_experts, size, expert_size, scheme
        for name, rows, columns in (("gate_up", 2 * expert_size, size), ("down", size, expert_size)):
            self.register_buffer(f"{name}_fp8", torch.empty(num_experts, rows, columns, dtype=E4M3))
            self.register_buffer(f"{name}_fp8_scale", torch.empty(num_experts, *scheme.scales(rows, columns)))
            self.register_buffer(f"{name}_input_fp8_scale", torch.empty(num_experts) if scheme.static else None)

    def expert(self, number: int) -> tuple[Fp8Weight, Fp8Weight]:
        """The two matrices of one expert."""
        return self._matrix("gate_up", number), self._matrix("down", number)

    def _matrix(self, name: str, number: int) -> Fp8Weight:
        values, scales, inputs = (getattr(self, f"{name}{ending}") for ending in ("_fp8", "_fp8_scale", "_input_fp8_scale"))
        matrix = Fp8Matrix(values[number], scales[number], weight_block(self.scheme))
        return Fp8Weight(matrix, None if inputs is None else inputs[number].view(1))

    def fill(self, number: int, gate_up: Fp8Weight, down: Fp8Weight) -> None:
        """Copy the two matrices of one expert to their places."""
        for name, weight in (("gate_up", gate_up), ("down", down)):
            getattr(self, f"{name}_fp8")[number] = weight.matrix.values
            getattr(self, f"{name}_fp8_scale")[number] = weight.matrix.scales
            if weight.input_scale is not None:
                getattr(self, f"{name}_input_fp8_scale")[number] = weight.input_scale[0]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""

        def expert(number: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            return self.expert_down(number, ops.swiglu(self.expert_gate_up(number, part_TD)))

        return ops.over_experts(x_TD, routing, self.num_experts, expert)

    def expert_gate_up(self, number: int, x_TD: Tensor) -> Tensor:
        """The first product of one expert, [T, D] -> [T, 2F]."""
        return apply(x_TD, self._matrix("gate_up", number), self.scheme)

    def expert_down(self, number: int, x_TF: Tensor) -> Tensor:
        """The second product of one expert, [T, F] -> [T, D]."""
        return apply(x_TF, self._matrix("down", number), self.scheme)

    def whole(self, dtype: torch.dtype) -> Experts:
        """The float experts whose weights the numbers stand for."""
        made = Experts(self.size, self.num_experts, self.expert_size).to(dtype)
        with torch.no_grad():
            for number in range(self.num_experts):
                gate_up, down = (restored_from_fp8(weight.matrix, self.scheme) for weight in self.expert(number))
                made.gate_up[number], made.down[number] = gate_up, down
        return made
