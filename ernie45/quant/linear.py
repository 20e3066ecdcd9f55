"""Modules that keep their weights packed. Each stands where a float module of `nn` stood and answers to the same calls.

Letters: T tokens, R rows of interest, D width, V vocabulary, E experts, F width of one expert, I and O in- and output widths.
"""

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.ops import PackedWeight, Routing
from ernie45.ops.codes import CodedWeight, coded_shapes, decode
from ernie45.quant.pack import pack, packed_shapes
from ernie45.quant.spec import Scheme


def _shapes(scheme: Scheme, out_size: int, in_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if scheme.code:
        return coded_shapes(scheme.code, out_size, in_size)
    return packed_shapes(out_size, in_size, scheme.weight_bits, scheme.group)


def _packed(scheme: Scheme, values: Tensor, scales: Tensor, out_size: int, in_size: int) -> PackedWeight:
    """As `ops` takes it. A code's weights are whole numbers with a scale for each group, so they become a packed weight of 8 bits."""
    if scheme.code:
        decoded = decode(CodedWeight(values, scales), scheme.code, in_size)
        return pack(decoded.whole_OI, decoded.scales_OG, 8, scheme.group, hadamard=scheme.hadamard)
    return PackedWeight(values, scales, scheme.weight_bits, out_size, scheme.hadamard, scheme.float_inputs)


def _after_loading(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, PackedMatrix | QuantExperts)
    module.forget_decoded()


class PackedMatrix(nn.Module):
    """A packed matrix [O, I]: buffers `weight_packed` and `weight_scale`, empty until they are filled. Two layers below use it."""

    def __init__(self, in_size: int, out_size: int, scheme: Scheme) -> None:
        super().__init__()
        self.in_size, self.out_size, self.scheme = in_size, out_size, scheme
        values, scales = _shapes(scheme, out_size, in_size)
        self._decoded: PackedWeight | None = None
        self.register_load_state_dict_post_hook(_after_loading)
        self.register_buffer("weight_packed", torch.empty(values, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float16))

    @property
    def weight(self) -> PackedWeight:
        """The packed matrix, as `ops` takes it; a coded one is decoded at first use."""
        if not self.scheme.code:
            return _packed(self.scheme, self.weight_packed, self.weight_scale, self.out_size, self.in_size)
        if self._decoded is None:
            self._decoded = _packed(self.scheme, self.weight_packed, self.weight_scale, self.out_size, self.in_size)
        return self._decoded

    def fill(self, weight: PackedWeight | CodedWeight) -> None:
        """Take the tensors of `weight`, without a copy."""
        assert weight.values.shape == self.weight_packed.shape, "the packed weight belongs to another matrix"
        assert weight.scales.shape == self.weight_scale.shape, "the packed weight has other groups"
        self.weight_packed, self.weight_scale, self._decoded = weight.values, weight.scales, None

    def forget_decoded(self) -> None:
        """Decode anew at the next use: the stored tensors are others now."""
        self._decoded = None

    def extra_repr(self) -> str:
        """Sizes for printing."""
        return f"{self.in_size} -> {self.out_size}, {self.scheme}"


class QuantLinear(PackedMatrix):
    """`x @ weight.T + bias` with a packed weight."""

    def __init__(self, in_size: int, out_size: int, scheme: Scheme, *, bias: Tensor | None = None) -> None:
        super().__init__(in_size, out_size, scheme)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out_TO = ops.packed_linear(x_TI, self.weight)
        return out_TO if self.bias is None else out_TO + self.bias


class QuantEmbedding(PackedMatrix):
    """An embedding that is the output head as well: rows are unpacked as tokens name them. `dtype` is the model's compute type."""

    def __init__(self, vocab_size: int, size: int, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__(size, vocab_size, scheme)
        self.dtype = dtype

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        return ops.dequantise_rows(self.weight, tokens_T)[:, : self.in_size].to(self.dtype).contiguous()

    def scores(self, h_RD: Tensor) -> Tensor:
        """The embedding as output head, [R, D] -> [R, V]."""
        return ops.packed_linear(h_RD, self.weight)


class QuantExperts(nn.Module):
    """E SwiGLUs with packed weights: `gate_up_packed` [E, ...] and `down_packed` [E, ...] with their scales."""

    gate_up_packed: Tensor
    gate_up_scale: Tensor
    down_packed: Tensor
    down_scale: Tensor

    def __init__(self, num_experts: int, size: int, expert_size: int, scheme: Scheme) -> None:
        super().__init__()
        self.size, self.expert_size, self.scheme = size, expert_size, scheme
        self._decoded: dict[int, tuple[PackedWeight, PackedWeight]] = {}
        self.register_load_state_dict_post_hook(_after_loading)
        for name, out_size, in_size in (("gate_up", 2 * expert_size, size), ("down", size, expert_size)):
            values, scales = _shapes(scheme, out_size, in_size)
            self.register_buffer(f"{name}_packed", torch.empty((num_experts, *values), dtype=torch.uint8))
            self.register_buffer(f"{name}_scale", torch.empty((num_experts, *scales), dtype=torch.float16))

    def expert(self, number: int) -> tuple[PackedWeight, PackedWeight]:
        """The two packed matrices of one expert; coded ones are decoded at first use."""
        if number in self._decoded:
            return self._decoded[number]
        inner = self.expert_size
        both = (
            _packed(self.scheme, self.gate_up_packed[number], self.gate_up_scale[number], 2 * inner, self.size),
            _packed(self.scheme, self.down_packed[number], self.down_scale[number], self.size, inner),
        )
        if self.scheme.code:
            self._decoded[number] = both
        return both

    def fill(self, number: int, gate_up: PackedWeight | CodedWeight, down: PackedWeight | CodedWeight) -> None:
        """Copy the two packed matrices of one expert in."""
        self._decoded.pop(number, None)
        self.gate_up_packed[number], self.gate_up_scale[number] = gate_up.values, gate_up.scales
        self.down_packed[number], self.down_scale[number] = down.values, down.scales

    def forget_decoded(self) -> None:
        """Decode anew at the next use: the stored tensors are others now."""
        self._decoded.clear()

    def expert_gate_up(self, number: int, x_TD: Tensor) -> Tensor:
        """The first product of one expert, [T, D] -> [T, 2F]."""
        return ops.packed_linear(x_TD, self.expert(number)[0])

    def expert_down(self, number: int, x_TF: Tensor) -> Tensor:
        """The second product of one expert, [T, F] -> [T, D]."""
        return ops.packed_linear(x_TF, self.expert(number)[1])

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D] -> [T, D]: pairs of token and expert sorted by expert, each expert run once over its own rows."""
        chosen = routing.experts.flatten()
        order = chosen.argsort(stable=True)
        rows = order // routing.experts.shape[1]
        counts = torch.bincount(chosen, minlength=self.gate_up_packed.shape[0]).tolist()
        parts = x_TD[rows].split(counts)
        done = [ops.packed_swiglu(part, *self.expert(e)) for e, part in enumerate(parts) if counts[e]]
        weights = routing.weights.flatten()[order].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, rows, torch.cat(done) * weights[:, None])
