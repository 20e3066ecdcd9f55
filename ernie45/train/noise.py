"""NEFTune: noise on the embeddings while a model is fine-tuned (arXiv 2310.05914). Letters: T tokens, D width."""

import hashlib

import torch
from torch import Tensor


class EmbeddingNoise:
    """Adds numbers uniform within `alpha / sqrt(L * D)`, where L is the length of the document they stand in.

    They are keyed by (seed, step, batch), so that a run that was stopped goes on with the same ones.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        assert alpha > 0, "no noise is None"
        self.alpha, self.seed = alpha, seed

    def __call__(self, x_TD: Tensor, doc_ends: tuple[int, ...], step: int, batch: int) -> Tensor:
        """[T, D] -> [T, D]."""
        key = hashlib.sha256(repr((self.seed, step, batch)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        noise_TD = torch.empty(x_TD.shape).uniform_(-1, 1, generator=generator)
        lengths = torch.tensor(doc_ends).diff(prepend=torch.tensor([0]))
        bounds_T = (self.alpha / (lengths * x_TD.shape[1]).sqrt()).repeat_interleave(lengths)
        return x_TD + (noise_TD * bounds_T[:, None]).to(x_TD.dtype)
