"""Rotary positions. Adjacent dimensions (2i, 2i + 1) form a pair that turns by `position * theta ** (-2i / H)`.

Angles and turns stay in float32 whatever the model computes in: bfloat16 positions lose whole tokens beyond a few hundred.
Letters: T tokens, H head size, P = H / 2 pairs.
"""

import torch
from torch import Tensor


def inverse_frequencies(head_size: int, theta: float) -> Tensor:
    """`theta ** (-2i / H)` for i = 0 .. P - 1, float32 [P], always on the CPU and never on the meta device."""
    exponents_P = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return 1.0 / theta**exponents_P


def turns(positions_T: Tensor, frequencies_P: Tensor) -> Tensor:
    """cos + i sin of `position * frequency`, complex64 [T, P]; computed once per forward pass and shared by all layers."""
    angles_TP = positions_T[:, None].float() * frequencies_P.to(positions_T.device)
    return torch.complex(angles_TP.cos(), angles_TP.sin())
