"""Quantisation-aware training: float weights that compute as the packed ones they will become, and learn through the rounding.

Forward rounds as serving will: the same whole numbers, the same float16 scales, turned inputs, activations as whole numbers. Backward lets
gradients through the rounding inside its range (straight-through, arXiv 1308.3432), and scales learn with the gradient of LSQ (1902.08153).
Scales are held as sign and logarithm, so that a step changes each by a share of itself. `pack_trained` takes whole numbers and scales over:
nothing is rounded a second time. Letters as in `quant.linear`; G groups of inputs, W inputs filled up to whole groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45 import ops
from ernie45.nn.layers import Embedding, Linear
from ernie45.nn.moe import Experts
from ernie45.ops import PackedWeight, Routing
from ernie45.ops.quantised import quantise_activations, turn_by_hadamard
from ernie45.quant.fp8_qat import ONLINE_PASSES, QatFp8Experts, QatFp8Linear, through_fp8
from ernie45.quant.hadamard import turned
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from ernie45.quant.model import decided_modules, fuse, replace_module
from ernie45.quant.pack import group_width, pack_as
from ernie45.quant.rtn import nearest, whole_numbers, whole_range
from ernie45.quant.spec import Fp8Scheme, QuantSpec, Scheme

_LEAST_SCALE = 2.0**-20
"""Far above the smallest float16, so that a group of zeros has a scale that can be divided by."""


class LearnedScales(nn.Module):
    """Scales of a matrix [O, I], or of E of them, one for each group: the sign of each stays, its logarithm learns."""

    sign: Tensor

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", torch.where(scales < 0, -1.0, 1.0))
        self.log_scale = nn.Parameter(scales.abs().clamp(min=_LEAST_SCALE).log())

    def forward(self) -> Tensor:
        """The scales as they will be stored, float16 values in float32; the gradient passes their rounding."""
        exact = self.sign * self.log_scale.exp()
        return exact + (exact.to(torch.float16).float() - exact).detach()


class _Rounded(torch.autograd.Function):
    """`whole * scale` of weights [O, I] in groups. Backward makes the whole numbers again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scales_OG: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(weight_OI, scales_OG)
        ctx.bits, ctx.group = bits, group
        whole = whole_numbers(_grouped(weight_OI, group), scales_OG, bits)
        return (whole * scales_OG[..., None]).flatten(1)[:, : weight_OI.shape[1]]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scales_OG = ctx.saved_tensors
        exact = _grouped(weight_OI, ctx.group) / scales_OG[..., None]
        whole = whole_numbers(_grouped(weight_OI, ctx.group), scales_OG, ctx.bits)
        low, high = whole_range(ctx.bits)
        inside = (exact >= low) & (exact <= high)  # beyond the range the whole number stands still
        pull = _grouped(upstream[0], ctx.group)
        into_scale_OG = (pull * torch.where(inside, whole - exact, whole)).sum(-1)
        return (pull * inside).flatten(1)[:, : weight_OI.shape[1]], into_scale_OG, None, None


def _grouped(matrix_OI: Tensor, group: int) -> Tensor:
    """[O, I] -> [O, G, group], the last group filled up with zeros."""
    return F.pad(matrix_OI, (0, -matrix_OI.shape[1] % group)).unflatten(1, (-1, group))


class _Matrix:
    """How a matrix of one scheme is rounded and multiplied, in the turned basis where the scheme turns."""

    def __init__(self, scheme: Scheme, in_size: int) -> None:
        self.scheme, self.in_size, self.group = scheme, in_size, group_width(in_size, scheme.group)

    def rounded(self, weight_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """The float matrix that will be packed, [O, W], or [O, I] where nothing is turned."""
        return _Rounded.apply(turned(weight_OI.float(), self.scheme), scales_OG, self.scheme.weight_bits, self.group)

    def product(self, x_TI: Tensor, rounded_OW: Tensor) -> Tensor:
        """`x @ weight.T` as serving computes it, in floats, in the type of `x`."""
        inputs_TW = turned(x_TI.float(), self.scheme)
        if not self.scheme.float_inputs:
            whole_TGI, scales_TG = quantise_activations(inputs_TW.detach(), self.group)
            rounded_TW = (whole_TGI.float() * scales_TG[..., None]).flatten(1)[:, : inputs_TW.shape[1]]
            inputs_TW = inputs_TW + (rounded_TW - inputs_TW).detach()
        return F.linear(inputs_TW, rounded_OW).to(x_TI.dtype)

    def packed(self, weight_OI: Tensor, scales_OG: Tensor) -> PackedWeight:
        """Whole numbers and scales as they were trained."""
        matrix_OW = turned(weight_OI.float(), self.scheme)
        whole = whole_numbers(_grouped(matrix_OW, self.group), scales_OG, self.scheme.weight_bits)
        return pack_as(self.scheme, whole.to(torch.int8).flatten(1)[:, : matrix_OW.shape[1]], scales_OG)


def _first_scales(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """Those of round-to-nearest, [O, G]."""
    return nearest(weight_OI, scheme)[1]


class QatLinear(nn.Module):
    """A `Linear` that computes as the `QuantLinear` it will become."""

    def __init__(self, base: Linear, scheme: Scheme) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_size, self.out_size = base.in_size, base.out_size
        self.scales = LearnedScales(_first_scales(base.weight, scheme))
        self.matrix = _Matrix(scheme, base.in_size)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = self.matrix.product(x_TI, self.matrix.rounded(self.weight, self.scales()))
        return out_TO if self.bias is None else out_TO + self.bias

    def packed(self) -> QuantLinear:
        """The packed layer."""
        made = QuantLinear(self.in_size, self.out_size, self.matrix.scheme, bias=self.bias)
        made.fill(self.matrix.packed(self.weight, self.scales()))
        return made


class QatEmbedding(nn.Module):
    """An embedding that is the output head too, and computes as the `QuantEmbedding` it will become.

    `weight`, which losses multiply by, is the rounded matrix: there activations stay floats, in `scores` they are rounded as well.
    """

    def __init__(self, base: Embedding, scheme: Scheme) -> None:
        super().__init__()
        self.latent, self.dtype = base.weight, base.weight.dtype
        self.scales = LearnedScales(_first_scales(base.weight, scheme))
        self.matrix = _Matrix(scheme, base.weight.shape[1])

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self._back(self.matrix.rounded(self.latent, self.scales()))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] int64 -> [T, D]: only the rows that are asked for are rounded."""
        rows_TD, scales_TG = F.embedding(tokens_T, self.latent), F.embedding(tokens_T, self.scales())
        return self._back(self.matrix.rounded(rows_TD, scales_TG))

    def scores(self, h_RD: Tensor) -> Tensor:
        """The embedding as output head, [R, D] -> [R, V]."""
        return self.matrix.product(h_RD, self.matrix.rounded(self.latent, self.scales()))

    def _back(self, rows_TW: Tensor) -> Tensor:
        if self.matrix.scheme.hadamard:
            rows_TW = turn_by_hadamard(rows_TW, self.matrix.group)
        return rows_TW[:, : self.matrix.in_size].to(self.dtype)

    def packed(self) -> QuantEmbedding:
        """The packed embedding."""
        tokens, width = self.latent.shape
        made = QuantEmbedding(tokens, width, self.matrix.scheme, self.dtype)
        made.fill(self.matrix.packed(self.latent, self.scales()))
        return made


class QatExperts(nn.Module):
    """`Experts` that compute as the `QuantExperts` they will become."""

    def __init__(self, base: Experts, scheme: Scheme) -> None:
        super().__init__()
        self.gate_up, self.down = base.gate_up, base.down
        self.num_experts, self.size, self.expert_size = base.num_experts, base.size, base.expert_size
        self.up_scales, self.down_scales = (
            LearnedScales(torch.stack([_first_scales(weight, scheme) for weight in stack])) for stack in (base.gate_up, base.down)
        )
        self.up_matrix, self.down_matrix = _Matrix(scheme, base.size), _Matrix(scheme, base.expert_size)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]."""
        ups, downs = self.gate_up.unbind(), self.down.unbind()
        up_scales, down_scales = self.up_scales().unbind(), self.down_scales().unbind()

        def expert(e: int, rows_T: Tensor, part_TD: Tensor) -> Tensor:
            inner_TF = ops.swiglu(self.up_matrix.product(part_TD, self.up_matrix.rounded(ups[e], up_scales[e])))
            return self.down_matrix.product(inner_TF, self.down_matrix.rounded(downs[e], down_scales[e]))

        return ops.over_experts(x_TD, routing, self.num_experts, expert)

    def packed(self) -> QuantExperts:
        """The packed experts."""
        made = QuantExperts(self.num_experts, self.size, self.expert_size, self.up_matrix.scheme)
        up_scales, down_scales = self.up_scales(), self.down_scales()
        for e in range(self.num_experts):
            made.fill(e, self.up_matrix.packed(self.gate_up[e], up_scales[e]), self.down_matrix.packed(self.down[e], down_scales[e]))
        return made


@torch.no_grad()
def prepare_training(network: nn.Module, spec: QuantSpec, *, online: int = ONLINE_PASSES) -> None:
    """Put a layer that computes as the packed one in the place of every module the spec names. Raises ConfigError as `quantise_model`.

    online: passes until static FP8 activations take the scale that was found (`quant.fp8_qat`).
    """
    for name, scheme in decided_modules(network, spec):
        module = network.get_submodule(name)
        if isinstance(scheme, Fp8Scheme):
            replace_module(network, name, through_fp8(module, name, scheme, online))
        elif isinstance(module, Linear):
            replace_module(network, name, QatLinear(module, scheme))
        elif isinstance(module, Embedding):
            replace_module(network, name, QatEmbedding(module, scheme))
        else:
            assert isinstance(module, Experts), f"'{name}' is no module that can be packed"
            replace_module(network, name, QatExperts(module, scheme))


@torch.no_grad()
def pack_trained(network: nn.Module) -> None:
    """Every layer of `prepare_training` as the packed one that it computed as: numbers and scales are taken over."""
    for name, module in list(network.named_modules()):
        if isinstance(module, QatLinear | QatEmbedding | QatExperts | QatFp8Linear | QatFp8Experts):
            replace_module(network, name, module.packed())
    fuse(network)
