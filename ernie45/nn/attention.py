"""Attention: the projections belong to the layer, how tokens see each other is an argument.

An `Attend` receives the rotated queries and keys of all tokens of this pass, packed without a batch axis, and returns what each token saw.
Training hands in `PackedCausal`, serving hands in attention over cache pages; the model knows neither. An `Attend` applies the scale
1 / sqrt(H) itself. Letters: T tokens, D width, N query heads, K key heads, H head size, P = H / 2 pairs.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.layers import Linear


class Attend(Protocol):
    """How the tokens of one pass see each other, and possibly tokens of earlier passes."""

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Return [T, N, H] for layer `layer` (from 0)."""
        ...


class PackedCausal:
    """Every document sees itself, causally, and nothing else.

    `doc_ends` are the ascending ends of the packed documents; the last one is the number of tokens. Positions are not its concern.
    """

    def __init__(self, doc_ends: list[int]) -> None:
        assert doc_ends == sorted(set(doc_ends)), "document ends must ascend"
        assert doc_ends[0] > 0, "a document holds at least one token"
        self.spans = list(zip([0, *doc_ends], doc_ends, strict=False))

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """[T, N, H] from [T, N, H] and [T, K, H] twice."""
        assert q_TNH.shape[0] == self.spans[-1][1], "document ends and tokens differ"
        if len(self.spans) == 1:
            return ops.causal_attention(q_TNH, k_TKH, v_TKH)
        lengths = [end - start for start, end in self.spans]  # split, since the gradient of a slice is as large as the whole
        parts = [ops.causal_attention(q, k, v) for q, k, v in zip(*(x.split(lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True)]
        return torch.cat(parts)


class BranchedCausal:
    """Groups of a prefix and branches that go on from it: a branch sees the prefix and itself, never another branch.

    `groups` are lengths: prefix (may be 0), then each branch. The prefix is computed once for all its branches.
    """

    def __init__(self, groups: list[tuple[int, ...]]) -> None:
        assert all(len(group) > 1 and group[0] >= 0 and min(group[1:]) > 0 for group in groups), "a prefix, then branches of tokens"
        self.groups = groups

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """[T, N, H] from [T, N, H] and [T, K, H] twice."""
        assert q_TNH.shape[0] == sum(map(sum, self.groups)), "groups and tokens differ"
        parts, start = [], 0
        for prefix, first, *others in self.groups:
            shared, joined = slice(start, start + prefix), slice(start, start + prefix + first)
            parts.append(ops.causal_attention(q_TNH[joined], k_TKH[joined], v_TKH[joined]))  # prefix and first branch are one document
            start = joined.stop
            for length in others:
                own = slice(start, start + length)
                # a branch longer than the prefix asks anew for the prefix: a causal pass without a mask is faster than one with it
                again = shared if prefix <= length else slice(0)
                q, k, v = (
                    torch.cat((q_TNH[again], q_TNH[own])),
                    torch.cat((k_TKH[shared], k_TKH[own])),
                    torch.cat((v_TKH[shared], v_TKH[own])),
                )
                parts.append(ops.causal_attention(q, k, v)[-length:])
                start += length
        return torch.cat(parts)


class Attention(nn.Module):
    """Grouped-query attention. `qkv` holds the rows of all query heads, then all key heads, then all value heads."""

    def __init__(self, layer: int, size: int, *, num_heads: int, num_kv_heads: int, head_size: int, bias: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.qkv = Linear(size, (num_heads + 2 * num_kv_heads) * head_size, bias=bias)
        self.out = Linear(num_heads * head_size, size, bias=bias)

    def forward(self, x_TD: Tensor, turns_TP: Tensor, attend: Attend) -> Tensor:
        """[T, D] -> [T, D]; `turns` is complex64 [T, P]."""
        rotated = self.num_heads + self.num_kv_heads
        heads_TMH = self.qkv(x_TD).view(-1, rotated + self.num_kv_heads, self.head_size)
        qk_TMH, v_TKH = heads_TMH.split((rotated, self.num_kv_heads), dim=1)
        q_TNH, k_TKH = ops.rotate_pairs(qk_TMH, turns_TP).split((self.num_heads, self.num_kv_heads), dim=1)
        seen_TNH = attend(self.layer, q_TNH, k_TKH, v_TKH)
        return self.out(seen_TNH.reshape(x_TD.shape[0], -1))
