"""Multi-token prediction: one more block that guesses the token after next, from which speculative decoding drafts.

For position i with trunk state h_i (before the final norm) and the next token t_{i+1}:
`u_i = project([norm(embed(t_{i+1})) ; norm(h_i)])`, then one dense block; the trunk's final norm and head read off token i + 2.
Source: ERNIE 4.5 technical report and the published training code. Letters: T tokens, D width, P rotary pairs.
"""

import torch
from torch import Tensor, nn

from ernie45.nn.attention import Attend
from ernie45.nn.block import Block
from ernie45.nn.layers import Linear, RMSNorm


class MultiTokenPredictor(nn.Module):
    """The block beside the trunk. `block` is a dense block whose attention has a layer number, and so cache pages, of its own."""

    def __init__(self, size: int, eps: float, block: Block) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.project = Linear(2 * size, size)
        self.block = block

    def forward(self, next_embedding_TD: Tensor, hidden_TD: Tensor, turns_TP: Tensor, attend: Attend) -> Tensor:
        """[T, D] and [T, D] -> [T, D], to be passed to the decoder's `logits`; the embedding half of the projection comes first."""
        both = torch.cat((self.embed_norm(next_embedding_TD), self.hidden_norm(hidden_TD)), dim=-1)
        return self.block(self.project(both), turns_TP, attend)
