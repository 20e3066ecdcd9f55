"""One pre-norm residual block. Letters: T tokens, D width, P rotary pairs."""

from torch import Tensor, nn

from ernie45.nn.attention import Attend, Attention
from ernie45.nn.layers import RMSNorm
from ernie45.nn.moe import MixtureOfExperts, Modality


class Block(nn.Module):
    """`h = x + attn(norm(x))`, then `h + ffn(norm(h))`; `ffn` is any module from [T, D] to [T, D].

    A mixture of experts with two banks also hears which tokens are seen ones; `modality` is None when all of them are text.
    """

    def __init__(self, size: int, eps: float, attn: Attention, ffn: nn.Module) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(size, eps)
        self.attn = attn
        self.ffn_norm = RMSNorm(size, eps)
        self.ffn = ffn

    def forward(self, x_TD: Tensor, turns_TP: Tensor, attend: Attend, modality: Modality | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        h_TD = x_TD + self.attn(self.attn_norm(x_TD), turns_TP, attend)
        normed_TD = self.ffn_norm(h_TD)
        if modality is not None and isinstance(self.ffn, MixtureOfExperts):
            return h_TD + self.ffn(normed_TD, modality)
        return h_TD + self.ffn(normed_TD)
