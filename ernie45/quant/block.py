"""A dense block in three calls: norm + q|k|v + rotation, output projection + residual, and the whole feed-forward half.

At one token a call costs as much as a small matrix: a step of the 0.3B model makes 72 calls this way in place of some 300.
Letters: T tokens, D width, P rotary pairs.
"""

from torch import Tensor, nn

from ernie45 import ops
from ernie45.nn.attention import Attend, Attention
from ernie45.nn.block import Block
from ernie45.nn.layers import SwiGLU
from ernie45.nn.moe import Modality
from ernie45.ops import PackedWeight
from ernie45.quant.linear import QuantLinear


def can_fuse(block: Block) -> bool:
    """Whether attention and feed-forward are packed throughout, without biases, in sizes the kernels take."""
    attn, ffn = block.attn, block.ffn
    if not isinstance(attn, Attention) or not isinstance(ffn, SwiGLU):
        return False
    parts = (attn.qkv, attn.out, ffn.gate_up, ffn.down)
    if not all(isinstance(part, QuantLinear) and part.bias is None for part in parts):
        return False
    return attn.head_size % 16 == 0 and isinstance(ffn.gate_up, QuantLinear) and ffn.gate_up.out_size % 32 == 0


def _packed(module: object) -> PackedWeight:
    assert isinstance(module, QuantLinear), "a fused block holds packed parts only"
    return module.weight


class QuantBlock(nn.Module):
    """A `Block` for which `can_fuse` holds; it keeps the parts, and so the names, of that block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        assert can_fuse(block), "this block has parts that are not packed"
        self.attn_norm, self.attn = block.attn_norm, block.attn
        self.ffn_norm, self.ffn = block.ffn_norm, block.ffn

    def plain(self) -> Block:
        """A block of the same parts that calls each of them by itself, so that something may stand in its place."""
        block = Block(self.attn_norm.weight.shape[0], self.attn_norm.eps, self.attn, self.ffn)
        block.attn_norm, block.ffn_norm = self.attn_norm, self.ffn_norm
        return block

    def forward(self, x_TD: Tensor, turns_TP: Tensor, attend: Attend, modality: Modality | None = None) -> Tensor:
        """[T, D] -> [T, D]; a dense block treats seen tokens as any others."""
        attn, ffn = self.attn, self.ffn
        q_TNH, k_TKH, v_TKH = ops.packed_qkv(
            x_TD, self.attn_norm.weight, self.attn_norm.eps, _packed(attn.qkv), turns_TP, attn.num_heads, attn.num_kv_heads
        )
        seen_TNH = attend(attn.layer, q_TNH, k_TKH, v_TKH)
        h_TD = ops.packed_linear_add(seen_TNH.reshape(x_TD.shape[0], -1), _packed(attn.out), x_TD)
        return ops.packed_feed_forward(h_TD, self.ffn_norm.weight, self.ffn_norm.eps, _packed(ffn.gate_up), _packed(ffn.down))
