"""Training through FP8 rounding: float weights that compute as the E4M3 matrices they will become.

Weights are rounded in each pass as they will be stored. Activations get scales as they come, or with `-static` one scale a matrix: in the
first passes the largest magnitude of the pass gives it, while a moving average of these is kept, and from then on that average does. What
is beyond the scale is cut off, and no gradient passes there; else the gradient passes the rounding as if it were none. With `-h` both
sides are turned by Hadamard matrices of 32. Source: ERNIE 4.5's FP8 training for serving (200 passes, rate 0.01).

The average moves once a backward pass, so that layers which are computed again in it see what they saw. Letters: T tokens, I and O in- and
output widths, E experts, D width, F width of one expert.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45 import ops
from ernie45.errors import ConfigError
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Experts
from ernie45.ops import Routing
from ernie45.ops.fp8 import E4M3_MAX, SMALLEST_SCALE, Fp8Matrix, fp8_inputs, from_fp8, to_fp8
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear, Fp8Weight, check_turn, input_block, weight_block
from ernie45.quant.hadamard import turned
from ernie45.quant.spec import Fp8Scheme

ONLINE_PASSES = 200
"""Passes whose own largest magnitude scales static activations."""
_RATE = 0.01


class _Through(torch.autograd.Function):
    """The second tensor, as if it were the first."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


class InputScale(nn.Module):
    """The static scale of what one matrix reads, float32 [1], while it is still found. Its tensors are saved with a run; none learns."""

    def __init__(self, online: int) -> None:
        super().__init__()
        self.online = online
        self.input_scale = nn.Parameter(torch.full((1,), SMALLEST_SCALE), requires_grad=False)
        self.passes = nn.Parameter(torch.zeros(1), requires_grad=False)
        self._own: Tensor | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        """The scale for a pass that reads `x`."""
        own = (x_TI.detach().float().abs().amax() / E4M3_MAX).clamp(min=SMALLEST_SCALE).view(1)
        if self.training:
            self._own = own
        return own if self.passes < self.online else self.input_scale.detach().clone()

    @torch.no_grad()
    def move(self) -> None:
        """Take the last pass into the average, which is the plain mean of the first passes."""
        if self._own is not None:
            self.passes.add_(1)
            self.input_scale.lerp_(self._own, max(_RATE, 1 / float(self.passes)))
            self._own = None


class _Matrix(nn.Module):
    """How a matrix of one scheme is rounded and multiplied, and its static scale where it has one."""

    def __init__(self, scheme: Fp8Scheme, online: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.static = InputScale(online) if scheme.static else None

    def weight(self, weight_OI: Tensor) -> Fp8Matrix:
        """As it will be stored."""
        return to_fp8(turned(weight_OI.detach().float(), self.scheme), weight_block(self.scheme))

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """`x @ weight.T` as serving computes it, in the type of `x`."""
        inputs_TI = turned(x_TI.float(), self.scheme)
        scale = None
        if self.static is not None:
            scale = self.static(inputs_TI)
            inputs_TI = inputs_TI.clamp(-E4M3_MAX * scale, E4M3_MAX * scale)
        rounded = from_fp8(fp8_inputs(inputs_TI.detach(), input_block(self.scheme), scale))
        learned = _Through.apply(turned(weight_OI.float(), self.scheme), from_fp8(self.weight(weight_OI)))
        return F.linear(_Through.apply(inputs_TI, rounded), learned).to(x_TI.dtype)

    def packed(self, weight_OI: Tensor) -> Fp8Weight:
        """The numbers of the last pass, and the scale that was found."""
        return Fp8Weight(self.weight(weight_OI), None if self.static is None else self.static.input_scale.detach().clone())


def _move_with(weight: nn.Parameter, matrices: Iterable[nn.Module]) -> None:
    """Let scales move when the gradient of `weight` is whole."""

    def move(_: Tensor) -> None:
        for matrix in matrices:
            if isinstance(matrix, _Matrix) and matrix.static is not None:
                matrix.static.move()

    weight.register_post_accumulate_grad_hook(move)


class QatFp8Linear(nn.Module):
    """A `Linear` that computes as the `Fp8Linear` it will become."""

    def __init__(self, base: Linear, scheme: Fp8Scheme, online: int) -> None:
        super().__init__()
        check_turn(scheme, base.in_size)
        self.weight, self.bias = base.weight, base.bias
        self.in_size, self.out_size, self.scheme = base.in_size, base.out_size, scheme
        self.matrix = _Matrix(scheme, online)
        _move_with(self.weight, [self.matrix])

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = self.matrix(x_TI, self.weight)
        return out_TO if self.bias is None else out_TO + self.bias

    def packed(self) -> Fp8Linear:
        """The layer of FP8 numbers."""
        made = Fp8Linear(self.in_size, self.out_size, self.scheme, bias=self.bias)
        made.fill(self.matrix.packed(self.weight))
        return made


class QatFp8Experts(nn.Module):
    """`Experts` that compute as the `Fp8Experts` they will become; an expert that reads nothing in a pass keeps its scale."""

    def __init__(self, base: Experts, scheme: Fp8Scheme, online: int) -> None:
        super().__init__()
        check_turn(scheme, base.size)
        check_turn(scheme, base.expert_size)
        self.gate_up, self.down, self.scheme = base.gate_up, base.down, scheme
        self.num_experts, self.size, self.expert_size = base.num_experts, base.size, base.expert_size
        self.up_matrices, self.down_matrices = (
            nn.ModuleList(_Matrix(scheme, online) for _ in range(base.num_experts)) for _ in ("gate_up", "down")
        )
        for weight, matrices in ((self.gate_up, self.up_matrices), (self.down, self.down_matrices)):
            _move_with(weight, matrices)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        ups, downs = self.gate_up.unbind(), self.down.unbind()

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            return self.down_matrices[e](ops.swiglu(self.up_matrices[e](part_TD, ups[e])), downs[e])

        return ops.over_experts(x_TD, routing, self.num_experts, expert)

    def packed(self) -> Fp8Experts:
        """The experts of FP8 numbers."""
        made = Fp8Experts(self.num_experts, self.size, self.expert_size, self.scheme)
        ups, downs = _packed(self.up_matrices, self.gate_up), _packed(self.down_matrices, self.down)
        for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
            made.fill(e, up, down)
        return made


def _packed(matrices: nn.ModuleList, stack_EOI: Tensor) -> list[Fp8Weight]:
    """Every expert's; one that read nothing takes the largest scale of the others."""
    learned = [(matrix, matrix.static) for matrix in matrices if isinstance(matrix, _Matrix)]
    known = [static.input_scale.detach() for _, static in learned if static is not None and static.passes > 0]
    most = torch.stack(known).amax(0) if known else torch.full((1,), 1 / E4M3_MAX)
    made = []
    for e, (matrix, static) in enumerate(learned):
        weight = matrix.packed(stack_EOI[e])
        made.append(weight if static is None or static.passes > 0 else weight._replace(input_scale=most.clone()))
    return made


def through_fp8(module: nn.Module, name: str, scheme: Fp8Scheme, online: int) -> nn.Module:
    """The layer that learns through the rounding of `scheme` in the place of `module`. Raises ConfigError for an embedding."""
    if isinstance(module, Linear):
        return QatFp8Linear(module, scheme, online)
    if isinstance(module, Experts):
        return QatFp8Experts(module, scheme, online)
    raise ConfigError(f"'{name}' is an embedding, which is not stored as {scheme}; keep it whole, or take w8a8 for it")
