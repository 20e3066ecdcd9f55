"""Keys and values of 8 or 4 bits, turned by a Hadamard matrix before they are rounded, and attention over them.

Queries are turned as keys are, which changes no score: (q R)(k R)^T = q k^T; what attention returns is turned back, (p v R) R = p v. The
turn spreads the few large dimensions that keys are known for. One float16 scale stands for all of a head at 8 bits, for 32 dimensions at 4.

Letters: T tokens of the step, S keys of one sequence, N query heads, K key heads, H head size, C dimensions that share a scale, P
groups of them.
"""

import math

import torch
from torch import Tensor

from ernie45.engine.batch import Batch
from ernie45.engine.cache import attend_rows, lazy_memory, masks_of, read_pages
from ernie45.errors import ConfigError
from ernie45.models.config import TextConfig
from ernie45.ops.quantised import hadamard

KV_BITS = {"int8": 8, "int4": 4}


def cell_width(head_size: int, bits: int) -> int:
    """Dimensions of a head that share a scale: at 4 bits 32 where they divide the head."""
    return 32 if bits == 4 and head_size % 32 == 0 else head_size


def packed_bytes_per_token(config: TextConfig, bits: int) -> int:
    """Cache bytes of one token: keys and values of all layers, with their scales."""
    head = config.head_size * bits // 8 + 2 * (config.head_size // cell_width(config.head_size, bits))
    return 2 * config.num_layers * config.num_kv_heads * head


class PackedCache:
    """For each layer keys and values as `values` uint8 [2, slots, K, H * bits / 8] and `scales` float16 [2, slots, K, P]."""

    def __init__(self, config: TextConfig, num_pages: int, page_size: int, dtype: torch.dtype, bits: int) -> None:
        """Raises `ConfigError` for an odd head size at 4 bits, and where the system does not give the memory."""
        size = config.head_size
        if bits == 4 and size % 2:
            raise ConfigError(f"the model's heads have {size} dimensions, which do not pair up into bytes; take kv int8")
        self.page_size, self.dtype, self.bits = page_size, dtype, bits
        self.turn_HH = hadamard(size & -size)  # the largest power of two that divides the head
        cells = size // cell_width(size, bits)
        shape = (config.num_layers, 2, num_pages * page_size, config.num_kv_heads)
        self.values = torch.frombuffer(lazy_memory(math.prod(shape) * size * bits // 8), dtype=torch.uint8).view(*shape, size * bits // 8)
        self.scales = torch.frombuffer(lazy_memory(math.prod(shape) * cells * 2), dtype=torch.float16).view(*shape, cells)

    def attend(self, batch: Batch) -> "PackedAttend":
        """The `Attend` of one step."""
        return PackedAttend(self, batch)

    def turned(self, x: Tensor) -> Tensor:
        """[.., H] times the Hadamard matrix, in float32; twice is no turn."""
        return (x.float().unflatten(-1, (-1, len(self.turn_HH))) @ self.turn_HH).flatten(-2)


class PackedAttend:
    """`Attend` for one step over a `PackedCache`: writes keys and values, then attends each request's rows over its pages."""

    def __init__(self, cache: PackedCache, batch: Batch) -> None:
        self._cache = cache
        self._batch = batch
        self._masks = masks_of(batch, cache.dtype)

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Causal attention of each row over its sequence so far, [T, N, H] -> [T, N, H]; scale 1 / sqrt(H)."""
        cache, slots_T = self._cache, self._batch.slots_T
        for place, x_TKH in enumerate((k_TKH, v_TKH)):
            values, scales = rounded(cache.turned(x_TKH), cache.bits)
            cache.values[layer, place].index_copy_(0, slots_T, values)
            cache.scales[layer, place].index_copy_(0, slots_T, scales)
        turned_TNH = cache.turned(q_TNH).to(q_TNH.dtype)
        out_TNH = torch.empty_like(q_TNH)
        for span in self._batch.spans:
            k_KSH, v_KSH = (
                restored(
                    read_pages(span, cache.values[layer, place], cache.page_size),
                    read_pages(span, cache.scales[layer, place], cache.page_size),
                    cache.bits,
                ).to(q_TNH.dtype)
                for place in (0, 1)
            )
            out_TNH[span.first : span.end] = attend_rows(turned_TNH[span.first : span.end], k_KSH, v_KSH, self._masks.get(span.first))
        return cache.turned(out_TNH).to(q_TNH.dtype)


def rounded(x_TKH: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers as bytes (with an offset; at 4 bits two to a byte, the first in the low half) and float16 scales.

    A head with a value that is no finite number gets the scale NaN, so that what is computed from it does not look sound.
    """
    top = 2 ** (bits - 1) - 1
    cells_TKPC = x_TKH.unflatten(-1, (-1, cell_width(x_TKH.shape[-1], bits)))
    largest_TKP = cells_TKPC.abs().amax(-1)
    scales_TKP = torch.where(largest_TKP.isfinite(), (largest_TKP / top).clamp(max=65504.0), torch.nan).to(torch.float16)
    inverse_TKP = torch.where(scales_TKP > 0, 1 / scales_TKP.float(), 0.0)
    whole = (cells_TKPC * inverse_TKP[..., None]).round().nan_to_num(0.0, 0.0, 0.0).clamp(-top, top).flatten(-2).to(torch.int16) + (top + 1)
    if bits == 4:
        whole = whole[..., ::2] | whole[..., 1::2] << 4
    return whole.to(torch.uint8), scales_TKP


def restored(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What `rounded` was given, up to rounding: float32 [.., H]."""
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
    whole = values.float() - 2 ** (bits - 1)
    return (whole.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]).flatten(-2)
