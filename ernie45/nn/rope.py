"""Rotary positions. Adjacent dimensions (2i, 2i + 1) form a pair that turns by `position * theta ** (-2i / H)`.

A token of a picture has three positions, time, row and column, and each frequency turns with one of them; a text token has the same number
three times, so that one-dimensional positions are the same thing written shorter. The vision tower turns with row and column alone.

Angles and turns stay in float32 whatever the model computes in: bfloat16 positions lose whole tokens beyond a few hundred.
Letters: T tokens, H head size, P = H / 2 pairs. Source of the allocation: ERNIE 4.5 technical report and published modelling files.
"""

import torch
from torch import Tensor

TIME, ROW, COLUMN = 0, 1, 2
"""Columns of positions [T, 3]."""


def inverse_frequencies(head_size: int, theta: float) -> Tensor:
    """`theta ** (-2i / H)` for i = 0 .. P - 1, float32 [P], always on the CPU and never on the meta device."""
    exponents_P = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return 1.0 / theta**exponents_P


def axes_of_frequencies(pairs: int, time_frequencies: int) -> Tensor:
    """Which column of the positions each frequency turns with, int64 [P]: rows and columns in turn, then the slowest ones with time."""
    axes_P = torch.full((pairs,), TIME, device="cpu")
    alternating = pairs - time_frequencies
    axes_P[0:alternating:2] = ROW
    axes_P[1:alternating:2] = COLUMN
    return axes_P


def turns(positions_T: Tensor, frequencies_P: Tensor) -> Tensor:
    """cos + i sin of `position * frequency`, complex64 [T, P]; computed once per forward pass and shared by all layers."""
    return _turned(positions_T[:, None].float() * frequencies_P.to(positions_T.device))


def turns_of_places(positions_T3: Tensor, frequencies_P: Tensor, axes_P: Tensor) -> Tensor:
    """As `turns`, for positions [T, 3] of which frequency i takes column `axes[i]`."""
    device = positions_T3.device
    return _turned(positions_T3[:, axes_P.to(device)].float() * frequencies_P.to(device))


def turns_of_patches(grid: tuple[int, int], merge: int, frequencies_Q: Tensor) -> Tensor:
    """Turns of the patches of one frame of `grid` (rows, columns), complex64 [rows * columns, 2Q]: Q for the row, Q for the column.

    Patches are in the order of the processors: blocks of `merge` x `merge` row by row, and row by row inside a block.
    """
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows // merge, merge, columns // merge, merge, 2)
    places_T2 = places.transpose(1, 2).reshape(-1, 2)
    return _turned((places_T2[:, :, None].float() * frequencies_Q).flatten(1))


def _turned(angles_TP: Tensor) -> Tensor:
    return torch.complex(angles_TP.cos(), angles_TP.sin())
