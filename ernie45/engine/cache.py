"""The paged key-value cache and attention over it.

Letters: T tokens of the step, S keys of one sequence, P its pages, N query heads, K key heads, G = N / K queries per key head, H head size.
"""

import mmap

import torch
from torch import Tensor
from torch.nn import functional as F

from ernie45 import ops
from ernie45.engine.batch import FEW_ROWS, Batch, Span, causal_mask
from ernie45.errors import ConfigError
from ernie45.models.config import TextConfig
from ernie45.models.counts import kv_bytes_per_token


class PagedCache:
    """Keys and values of all layers, [num_slots, K, H] each, num_slots = num_pages * page_size; `store` is all of it, [layers, 2, ...].

    The memory is an anonymous mapping: it reads as zero, and a page of it costs nothing until it is first written. A generous cache
    therefore takes only what its requests use.
    """

    def __init__(self, config: TextConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        self.page_size = page_size
        self.dtype = dtype
        shape = (config.num_layers, 2, num_pages * page_size, config.num_kv_heads, config.head_size)
        size = num_pages * page_size * kv_bytes_per_token(config, dtype.itemsize)
        self.store = torch.frombuffer(lazy_memory(size), dtype=dtype).view(shape)
        self.keys = tuple(layer[0] for layer in self.store)
        self.values = tuple(layer[1] for layer in self.store)

    def attend(self, batch: Batch) -> "PagedAttend":
        """The `Attend` of one step."""
        return PagedAttend(self, batch)


def lazy_memory(size: int) -> mmap.mmap:
    """`size` zero bytes that the system provides as they are touched. Raises `ConfigError` where it promises no more than it has."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # Windows knows no flags
    try:
        return mmap.mmap(-1, size, **flags)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"the system does not give {size:,} bytes for the cache ({error}); set num_pages or max_length smaller") from None


class PagedAttend:
    """`Attend` for one step: writes the step's keys and values to their slots, then attends each request's rows over its own pages.

    All writing of a layer comes before its reading, so rows may share pages that are filled in this very step.
    """

    def __init__(self, cache: PagedCache, batch: Batch) -> None:
        self._cache = cache
        self._batch = batch
        self._native = ops.KERNELS is not None and batch.few_rows
        if self._native:
            self._pages_TP, self._lengths_T = batch.by_row()
        self._masks = masks_of(batch, cache.dtype)

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Causal attention of each row over its sequence so far, [T, N, H] -> [T, N, H]; scale 1 / sqrt(H)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._batch.slots_T, k_TKH)
        values.index_copy_(0, self._batch.slots_T, v_TKH)
        spans = self._batch.spans
        # the kernel takes head sizes of whole vectors, and one call for all rows in place of one each
        if self._native and q_TNH.shape[-1] % 16 == 0:
            return ops.paged_attention(q_TNH.contiguous(), keys, values, self._pages_TP, self._lengths_T, self._cache.page_size)
        if len(spans) == 1:
            return self._attend(spans[0], q_TNH, keys, values)
        out_TNH = torch.empty_like(q_TNH)
        for span in spans:
            out_TNH[span.first : span.end] = self._attend(span, q_TNH[span.first : span.end], keys, values)
        return out_TNH

    def _attend(self, span: Span, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        size = self._cache.page_size
        return attend_rows(q_TNH, read_pages(span, keys, size), read_pages(span, values, size), self._masks.get(span.first))


def masks_of(batch: Batch, dtype: torch.dtype) -> dict[int, Tensor]:
    """By first row the masks of spans that continue a sequence: they cannot use the causal order that starts at its beginning."""
    return {
        span.first: causal_mask(span.end - span.first, span.length, dtype)
        for span in batch.spans
        if span.start > 0 and span.end - span.first > 1
    }


def attend_rows(q_TNH: Tensor, k_KSH: Tensor, v_KSH: Tensor, mask: Tensor | None) -> Tensor:
    """One request's rows over its keys and values [1, K, S, H], [T, N, H] -> [T, N, H]; without a mask they begin the sequence."""
    T, N, H = q_TNH.shape
    K = k_KSH.shape[1]
    if mask is not None and T <= FEW_ROWS:  # each as if it came alone: drafts must not change how sums are rounded
        first = k_KSH.shape[2] - T + 1
        return torch.cat([attend_rows(q_TNH[t : t + 1], k_KSH[:, :, : first + t], v_KSH[:, :, : first + t], None) for t in range(T)])
    if T == 1:  # the G queries of a key head become rows of one small product: each key is read once, and nothing is masked
        return F.scaled_dot_product_attention(q_TNH.reshape(1, K, N // K, H), k_KSH, v_KSH).reshape(1, N, H)
    q_NTH = q_TNH.transpose(0, 1).unsqueeze(0)
    out_NTH = F.scaled_dot_product_attention(q_NTH, k_KSH, v_KSH, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out_NTH.squeeze(0).transpose(0, 1)


def read_pages(span: Span, slots: Tensor, page_size: int) -> Tensor:
    """What a sequence has in `slots` [slots, K, X], as [1, K, S, X]: a view when its pages are consecutive, else a copy page by page."""
    if span.pages is None:
        return slots[span.run * page_size : span.run * page_size + span.length].transpose(0, 1).unsqueeze(0)
    pages = slots.view(-1, page_size * slots.shape[1] * slots.shape[2]).index_select(0, span.pages)
    return pages.view(-1, slots.shape[1], slots.shape[2])[: span.length].transpose(0, 1).unsqueeze(0)
