"""The compiled kernels of the distribution `ernie45-kernels`, when they are installed: found, loaded and described once.

Each function has the contract of its twin in `quantised` or `reference`.
"""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie45.errors import ConfigError, did_you_mean
from ernie45.ops import eager, learned
from ernie45.ops.optimise import AdamwNumbers, adamw
from ernie45.ops.quantised import PackedWeight
from ernie45.ops.reference import Routing

_LOG = logging.getLogger(__name__)

INTERFACE = 5  # the operators' interface that this code speaks; raised together with kInterface in kernels/src/tensors.h
NAMES = ("amx", "avx512", "avx_vnni", "avx2", "neon", "plain")  # what ERNIE45_ISA may say, with "python" for no compiled kernels at all


@dataclass(frozen=True)
class Native:
    """The compiled kernels for one instruction set; `isa` is one of `available`, best first."""

    isa: str
    available: tuple[str, ...]

    def packed_linear(self, x_TI: Tensor, weight: PackedWeight) -> Tensor:
        """See `quantised.packed_linear`."""
        return torch.ops.ernie45.linear(x_TI, None, 0.0, weight.values, weight.scales, weight.format, weight.out_size, None, self.isa)

    def norm_packed_linear(self, x_TD: Tensor, norm_D: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        """See `quantised.norm_packed_linear`."""
        return torch.ops.ernie45.linear(x_TD, norm_D, eps, weight.values, weight.scales, weight.format, weight.out_size, None, self.isa)

    def packed_linear_add(self, x_TI: Tensor, weight: PackedWeight, addend_TO: Tensor) -> Tensor:
        """See `quantised.packed_linear_add`."""
        return torch.ops.ernie45.linear(x_TI, None, 0.0, weight.values, weight.scales, weight.format, weight.out_size, addend_TO, self.isa)

    def packed_qkv(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, weight: PackedWeight, turns_TP: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `quantised.packed_qkv`; head sizes must be a multiple of 16."""
        size = weight.out_size // (num_heads + 2 * num_kv_heads)
        turns = torch.view_as_real(turns_TP)
        return torch.ops.ernie45.qkv(
            x_TD, norm_D, eps, weight.values, weight.scales, weight.format, turns, num_heads, num_kv_heads, size, self.isa
        )

    def packed_feed_forward(self, x_TD: Tensor, norm_D: Tensor, eps: float, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        """See `quantised.packed_feed_forward`; the inner width must be a multiple of 16."""
        return torch.ops.ernie45.feed_forward(
            x_TD, norm_D, eps, gate_up.values, gate_up.scales, gate_up.format, down.values, down.scales, down.format, gate_up.out_size // 2,
            self.isa,
        )  # fmt: skip

    def packed_swiglu(self, x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight) -> Tensor:
        """See `quantised.packed_swiglu`; an inner width that is no multiple of 16 takes two products, and torch between them."""
        if gate_up.out_size % 32:
            return self.packed_linear(eager.swiglu(self.packed_linear(x_TD, gate_up)), down)
        return torch.ops.ernie45.feed_forward(
            x_TD, None, 0.0, gate_up.values, gate_up.scales, gate_up.format, down.values, down.scales, down.format, gate_up.out_size // 2,
            self.isa,
        )  # fmt: skip

    def paged_attention(self, q_BNH: Tensor, keys: Tensor, values: Tensor, pages_BP: Tensor, lengths_B: Tensor, page_size: int) -> Tensor:
        """See `quantised.paged_attention`; head sizes must be a multiple of 16."""
        return torch.ops.ernie45.paged_attention(q_BNH, keys, values, pages_BP, lengths_B, page_size, self.isa)

    def bf16_linear(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """`x @ weight.T` for a bfloat16 weight, summed in float32, in the type of `x`; float32 activations are not rounded."""
        return torch.ops.ernie45.bf16_linear(x_TI, weight_OI, self.isa)

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """See `reference.linear`; torch computes what the kernels do not take or would not make faster."""
        if self._multiplies(x_TI, weight_OI) and not torch.is_inference_mode_enabled():
            out_TO = learned.Linear.apply(x_TI, weight_OI, self.product)
            return out_TO if bias_O is None else out_TO + bias_O
        if weight_OI.dtype != torch.bfloat16 or not self._faster(x_TI) or not _plain_memory(x_TI, weight_OI):
            return eager.linear(x_TI, weight_OI, bias_O)
        out_TO = torch.ops.ernie45.bf16_linear(x_TI, weight_OI, self.isa)
        return out_TO if bias_O is None else out_TO + bias_O

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right` of bfloat16 matrices that lie by rows or by columns; sums in float32, in one order on any number of threads."""
        return torch.ops.ernie45.matmul(_lying(left), _lying(right), False, self.isa)

    def wide_product(self, left: Tensor, right: Tensor) -> Tensor:
        """See `eager.wide_product`: the sums are not rounded to bfloat16 first."""
        if not self._multiplies(left, right):
            return eager.wide_product(left, right)
        return torch.ops.ernie45.matmul(_lying(left), _lying(right), True, self.isa)

    def add_product(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """See `eager.add_product`: the sums are added as they come, and nothing of their size is made."""
        if self._multiplies(left, right):
            torch.ops.ernie45.add_matmul(sums, _lying(left), _lying(right), self.isa)
        else:
            eager.add_product(sums, left, right)

    def adamw(self, weight: Tensor, low: Tensor | None, gradient: Tensor, mean: Tensor, square: Tensor, numbers: AdamwNumbers) -> None:
        """See `ops.optimise`: one pass over memory, and the same bits."""
        if weight.is_cpu and hasattr(torch.ops.ernie45, "adamw"):
            torch.ops.ernie45.adamw(weight, low, gradient, mean, square, *numbers, self.isa)
        else:
            adamw(weight, low, gradient, mean, square, numbers)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See `reference.rms_norm`: one pass over each row, where torch makes eight."""
        if not _inferring(x_TD) or x_TD.dim() != 2 or x_TD.stride(1) != 1 or weight_D.dtype != x_TD.dtype or not weight_D.is_contiguous():
            return eager.rms_norm(x_TD, weight_D, eps)
        return torch.ops.ernie45.rms_norm(x_TD, weight_D, eps, self.isa)

    def rotate_pairs(self, x_TNH: Tensor, turns_TP: Tensor) -> Tensor:
        """See `reference.rotate_pairs`: one pass, where torch widens, turns and narrows."""
        size = x_TNH.shape[-1]
        if not _inferring(x_TNH) or size % 16 or x_TNH.stride()[1:] != (size, 1) or not turns_TP.is_contiguous():
            return eager.rotate_pairs(x_TNH, turns_TP)
        return torch.ops.ernie45.rotate(x_TNH.flatten(1), torch.view_as_real(turns_TP), self.isa).view(x_TNH.shape)

    def swiglu(self, gate_up_TF: Tensor) -> Tensor:
        """See `reference.swiglu`: one pass, where torch makes two."""
        if not _inferring(gate_up_TF) or gate_up_TF.dim() != 2 or gate_up_TF.stride(1) != 1:
            return eager.swiglu(gate_up_TF)
        return torch.ops.ernie45.swiglu(gate_up_TF, self.isa)

    def experts(self, x_TD: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        """See `reference.experts`."""
        return eager.experts(x_TD, routing, gate_up_EFD, down_EDF, self.linear, self.swiglu)

    def _multiplies(self, left: Tensor, right: Tensor) -> bool:
        """Whether these two are matrices for the kernels' products of learning: torch's take two to three times as long where a factor lies
        by columns (docs/log-train.md)."""
        two = (left, right)
        fits = all(x.dim() == 2 and x.is_cpu and x.dtype == torch.bfloat16 and min(x.shape) >= _LEAST_SIDE for x in two)
        return fits and self.isa == "amx" and hasattr(torch.ops.ernie45, "matmul")  # an operator that came after interface 2 was numbered

    def _faster(self, x_TI: Tensor) -> bool:
        """Whether the kernels beat torch for these activations and a bfloat16 weight, as measured (docs/log.md)."""
        if x_TI.dtype == torch.float32:  # tiles: 2 to 3 times as fast for any number of rows; vectors read the weight once for eight rows
            return self.isa == "amx" or x_TI.shape[0] <= _VECTOR_ROWS
        return self.isa == "amx" and x_TI.shape[0] <= _TILE_ROWS


_LEAST_SIDE = 33  # fewer rows or columns leave most of a tile empty
_FLOATS = (torch.float32, torch.bfloat16)
_VECTOR_ROWS = 16
_TILE_ROWS = 32  # bfloat16 throughout: beyond, torch's own tiles are as fast


def _lying(matrix: Tensor) -> Tensor:
    """The matrix as it is where it lies by rows or by columns, else a copy that does."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _inferring(x: Tensor) -> bool:
    """Whether row work may be ours: in inference mode alone, so that what trains and its reference do the same operations."""
    return torch.is_inference_mode_enabled() and x.is_cpu and x.dtype in _FLOATS


def _plain_memory(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """What the kernels take: rows in one piece on the CPU, and nobody who wants a gradient."""
    wants_gradient = torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad)
    return not wants_gradient and x_TI.is_cpu and weight_OI.is_contiguous() and x_TI.stride(1) == 1


def find_library() -> Path | None:
    """The shared library, when the distribution is installed and holds one."""
    spec = importlib.util.find_spec("ernie45_kernels")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(place) / "kernels.so"
        if library.is_file():
            return library
    return None


def obstacle(library: Path | None) -> str | None:
    """Why the kernels in `library` cannot be used, and what to do about it; None when they can: then they are loaded."""
    if library is None:
        return "the native kernels are not installed; run: make kernels"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the installed native kernels do not load ({str(error).splitlines()[0]}); run: make kernels"
    ours = torch.ops.ernie45
    found = ours.interface_number() if hasattr(ours, "interface_number") else 0  # before they were numbered
    if found != INTERFACE:
        age = "older" if found < INTERFACE else "newer"
        return f"the installed native kernels are {age} than this ernie45 (interface {found}, not {INTERFACE}); run: make kernels"
    return None


def load(isa: str | None, library: Path | None) -> Native | None:
    """The kernels for `isa` (None: the best this machine runs), or None where there are none; installed ones that cannot be used are
    reported once, as a warning.

    Raises `ConfigError` when `isa` names kernels that do not exist, are not installed, cannot be used, or do not run on this machine.
    """
    if isa not in (None, "python", *NAMES):
        raise ConfigError(f"ERNIE45_ISA is '{isa}'{did_you_mean(str(isa), ('python', *NAMES))}")
    if isa == "python":
        return None
    why = obstacle(library)
    if why is not None:
        if isa is not None:
            raise ConfigError(f"ERNIE45_ISA asks for '{isa}', but {why}")
        if library is not None:
            _LOG.warning("%s; until then everything runs without them, quantised models slower", why)
        return None
    _register_shapes()
    available = tuple(torch.ops.ernie45.available().split(","))
    if isa is not None and isa not in available:
        raise ConfigError(f"ERNIE45_ISA asks for '{isa}', which this machine cannot run; it can run {', '.join(available)}")
    return Native(isa or available[0], available)


def _register_shapes() -> None:
    """Tell torch what each operator returns, for `torch.compile` and for tracing without data."""

    def linear(
        x: Tensor, norm: Tensor | None, eps: float, packed: Tensor, scale: Tensor, bits: int, out_size: int, addend: Tensor | None, isa: str
    ) -> Tensor:
        return x.new_empty(x.shape[0], out_size)

    def qkv(
        x: Tensor, norm: Tensor | None, eps: float, packed: Tensor, scale: Tensor, bits: int, turns: Tensor, heads: int, kv_heads: int,
        head_size: int, isa: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        T = x.shape[0]
        return x.new_empty(T, heads, head_size), x.new_empty(T, kv_heads, head_size), x.new_empty(T, kv_heads, head_size)

    def feed_forward(
        x: Tensor, norm: Tensor | None, eps: float, gate_up: Tensor, gate_up_scale: Tensor, gate_up_bits: int, down: Tensor,
        down_scale: Tensor, down_bits: int, inner: int, isa: str,
    ) -> Tensor:  # fmt: skip
        return torch.empty_like(x)

    def bf16_linear(x: Tensor, weight: Tensor, isa: str) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    def rms_norm(x: Tensor, weight: Tensor, eps: float, isa: str) -> Tensor:
        return x.new_empty(x.shape)

    def rotate(x: Tensor, turns: Tensor, isa: str) -> Tensor:
        return x.new_empty(x.shape)

    def swiglu(x: Tensor, isa: str) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1] // 2)

    def paged_attention(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, page_size: int, isa: str) -> Tensor:
        return torch.empty_like(q)

    def matmul(left: Tensor, right: Tensor, wide: bool, isa: str) -> Tensor:
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32 if wide else None)

    def tower_heads(
        x: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, qkv: Tensor, qkv_scale: Tensor | None, qkv_bias: Tensor, turns: Tensor,
        heads: int, size: int, first: int, space: Tensor, isa: str,
    ) -> None:  # fmt: skip
        return None

    def tower_rest(
        x: Tensor, space: Tensor, heads: int, size: int, first: int, out: Tensor, out_scale: Tensor | None, out_bias: Tensor, norm: Tensor,
        norm_bias: Tensor, eps: float, up: Tensor, up_scale: Tensor | None, up_bias: Tensor, down: Tensor, down_scale: Tensor | None,
        down_bias: Tensor, isa: str,
    ) -> Tensor:  # fmt: skip
        return torch.empty_like(x)

    for shape_of in (linear, qkv, feed_forward, bf16_linear, rms_norm, rotate, swiglu, paged_attention, matmul, tower_heads, tower_rest):
        if hasattr(torch.ops.ernie45, shape_of.__name__):
            torch.library.register_fake(f"ernie45::{shape_of.__name__}", shape_of, allow_override=True)
