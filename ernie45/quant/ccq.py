"""Encoders for the codes of about two bits that `ops/codes.py` decodes.

Rows are encoded piece by piece along the inputs. A piece of a convolutional code (4 weights, or chains of 3 and 4) is the nearest of all
its points: with 128 to 512 of them that is exact and cheap. The trellis code takes the best path by Viterbi's algorithm over
the whole row. With a Gram matrix what each piece loses is spread over the inputs to come, as GPTQ does by single columns (blocks of
columns: Tseng et al. 2024, arXiv 2402.04396); the path is then taken 32 inputs at a time, with a look ahead at the next 16.

Letters: O and I out- and input widths, G groups, R rows in work, W inputs of a piece, C points, S states of the trellis.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.ops.codes import (
    CHAIN_OF_3,
    CHAIN_OF_4,
    CODE_GROUP,
    LOCAL_STEPS,
    TRELLIS,
    CodedWeight,
    cluster_points,
    code_scales,
    decode,
)

_ROWS_AT_ONCE = 512
_TRELLIS_STEP, _TRELLIS_LOOK = 32, 16
_TRELLIS_UNIT = 0.022979  # `TRELLIS` was found for normal numbers of this scale
_SAMPLE = 2048  # four-vectors that decide on the constants of a matrix
_UNITS = tuple(0.7 + 0.05 * step for step in range(15))  # scales tried, as shares of the first guess
# Constants of ccq2.06, exact in float16: the best of 2,000 pairs on normal numbers, of which a matrix takes what suits it. Most pairs are
# bad, with up to four times the error.
_CLUSTERS = (
    (120.0625, 556.0), (120.0625, 676.0), (120.0625, 1442.0), (120.9375, 907.0), (119.9375, 510.0), (120.0, 1836.0), (121.0, 1650.0),
    (116.25, 1219.0),
)  # fmt: skip
_CLUSTER_UNIT = 0.0625


class Encoded(NamedTuple):
    """The coded matrix, and what it decodes to, float32 [O, I]."""

    weight: CodedWeight
    restored_OI: Tensor


class Feedback(NamedTuple):
    """The upper Cholesky factor of H^-1 in the order of the inputs, [I filled up, I filled up]."""

    factor_II: Tensor


def feedback(gram_II: Tensor, damping: float) -> Feedback:
    """From the Gram matrix [I, I] of the inputs; inputs that never occurred, and filling, get the damping alone."""
    filling = -len(gram_II) % CODE_GROUP
    gram = torch.nn.functional.pad(gram_II.double(), (0, filling, 0, filling))
    mean = float(gram.diagonal().mean()) or 1.0
    while True:
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return Feedback(upper.float())
        assert damping < 100, "a Gram matrix with NaN gets no statistics this far"
        damping = max(damping * 10, 1e-6)


def encode(weight_OI: Tensor, code: str, spread: Feedback | None = None) -> Encoded:
    """Encode a matrix, turned already where its scheme turns. Raises `CheckpointError` when it holds values that are no finite numbers."""
    if not bool(weight_OI.isfinite().all()):
        raise CheckpointError("a weight holds NaN or infinities and cannot be quantised; the checkpoint is damaged")
    filled_OI = torch.nn.functional.pad(weight_OI.float(), (0, -weight_OI.shape[1] % CODE_GROUP))
    energy_OG = _energy(filled_OI, weight_OI.shape[1])
    points = _Points.chosen(filled_OI, energy_OG, code)
    parts = [
        _encode_rows(rows_RI, energy_RG, points, spread)
        for rows_RI, energy_RG in zip(filled_OI.split(_ROWS_AT_ONCE), energy_OG.split(_ROWS_AT_ONCE), strict=True)
    ]
    weight = CodedWeight(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))
    whole_OI, scales_OG = decode(weight, code, weight_OI.shape[1])
    restored_OI = whole_OI.float() * scales_OG.repeat_interleave(CODE_GROUP, 1)
    return Encoded(weight, restored_OI[:, : weight_OI.shape[1]])


class _Points(NamedTuple):
    """What a code can say: the points [C, W] of one group's pieces in order (trellis: none), the scale of a group of unit energy, and
    the row constants before the super scale.
    """

    code: str
    pieces: tuple[Tensor, ...]
    unit: float
    constants: tuple[float, ...]

    @classmethod
    def chosen(cls, weight_OI: Tensor, energy_OG: Tensor, code: str) -> "_Points":
        """With constants and unit that suit the matrix, judged on a sample of its four-vectors."""
        if code == "tcq2.06":
            return cls(code, (), _TRELLIS_UNIT, ())
        if code == "ccq2.5":
            three, four, one = (_chain_points(chain) for chain in (CHAIN_OF_3, CHAIN_OF_4, (0,)))
            sample = _sample(weight_OI, energy_OG)
            unit = min((_loss(sample, four, unit), unit) for unit in (0.4 * share for share in _UNITS))[1]
            return cls(code, (*(three, four) * 9, one), unit, ())
        sample, both = _sample(weight_OI, energy_OG), torch.tensor(_CLUSTERS)
        _, best = min((_loss(sample, cluster_points(*pair), _CLUSTER_UNIT), number) for number, pair in enumerate(both))
        found = cluster_points(*both[best])
        unit = min((_loss(sample, found, unit), unit) for unit in (_CLUSTER_UNIT * share for share in _UNITS))[1]
        return cls(code, (found,) * (CODE_GROUP // 4), unit, _CLUSTERS[best])


def _chain_points(shifts: tuple[int, ...]) -> Tensor:
    """All values of a chain of windows of 3 bits, float32 [2^bits, windows]."""
    word = torch.arange(1 << (shifts[0] + 3))
    return torch.stack([((word >> shift) & 7) - 4 for shift in shifts], dim=-1).float()


def _sample(weight_OI: Tensor, energy_OG: Tensor) -> Tensor:
    """Four-vectors of groups of unit energy, [_SAMPLE, 4] at most, evenly spread."""
    vectors = (weight_OI.unflatten(1, (-1, CODE_GROUP)) / energy_OG[..., None]).reshape(-1, 4)
    return vectors[:: max(1, len(vectors) // _SAMPLE)]


def _energy(filled_OI: Tensor, in_size: int) -> Tensor:
    """The root mean square of every group, [O, G]; filling does not count."""
    sums_OG = filled_OI.square().unflatten(1, (-1, CODE_GROUP)).sum(-1)
    counts_G = (in_size - CODE_GROUP * torch.arange(sums_OG.shape[1])).clamp(max=CODE_GROUP)
    return (sums_OG / counts_G).sqrt().clamp(min=1e-12)


def _loss(sample: Tensor, points_CW: Tensor, unit: float) -> float:
    scaled = sample / unit
    return float((scaled - points_CW[_nearest(scaled, points_CW)]).square().mean()) * unit**2


def _nearest(target_RW: Tensor, points_CW: Tensor) -> Tensor:
    """The number of the nearest point, [R]."""
    return torch.addmm(points_CW.square().sum(1), target_RW, points_CW.t(), alpha=-2).argmin(1)


def _encode_rows(rows_RI: Tensor, energy_RG: Tensor, points: _Points, spread: Feedback | None) -> CodedWeight:
    code, steps = points.code, LOCAL_STEPS[points.code]
    wanted_RG = energy_RG * points.unit
    super_R = (wanted_RG.amax(1) * steps / (steps - 1)).to(torch.float16)
    local_RG = (wanted_RG * steps / super_R.float().clamp(min=1e-7)[:, None]).round().nan_to_num(1).clamp(1, steps - 1).to(torch.int32)
    scales_RG = code_scales(local_RG, super_R, code).clamp(min=1e-7)
    numbers = _numbers(rows_RI, scales_RG, points, spread)
    constants = torch.tensor([points.constants], dtype=torch.float16).expand(len(rows_RI), -1)
    return CodedWeight(_packed(numbers, local_RG, code), torch.cat((constants, super_R[:, None]), dim=1).contiguous())


def _numbers(rows_RI: Tensor, scales_RG: Tensor, points: _Points, spread: Feedback | None) -> list[Tensor]:
    """The number of the point of every piece, or of the trellis the states of its inputs."""
    rest_RI = rows_RI.clone()
    numbers: list[Tensor] = []
    past_R = torch.zeros(len(rows_RI), dtype=torch.long)
    for begin, end, points_CW in _pieces(points, rows_RI.shape[1], _TRELLIS_STEP if spread else rows_RI.shape[1]):
        scale_R1 = scales_RG[:, begin // CODE_GROUP, None]
        if points_CW is None:
            ahead = min(end + _TRELLIS_LOOK, rest_RI.shape[1])
            scales_RW = scales_RG.repeat_interleave(CODE_GROUP, 1)[:, begin:ahead]
            states_RW = best_path(rest_RI[:, begin:ahead] / scales_RW, past_R)[:, : end - begin]
            numbers.append(states_RW)
            past_R, said_RW = states_RW[:, -1], TRELLIS[states_RW].float()
        else:
            number_R = _nearest(rest_RI[:, begin:end] / scale_R1, points_CW)
            numbers.append(number_R)
            said_RW = points_CW[number_R]
        if spread is not None and end < rest_RI.shape[1]:
            factor = spread.factor_II
            lost_RW = rest_RI[:, begin:end] - said_RW * scale_R1
            errors_RW = torch.linalg.solve_triangular(factor[begin:end, begin:end], lost_RW, upper=True, left=False)
            rest_RI[:, end:].addmm_(errors_RW, factor[begin:end, end:], alpha=-1)
    return numbers


def _pieces(points: _Points, in_size: int, step: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """Inputs from where to where, and the points to choose from; the trellis has none, and takes `step` inputs at once."""
    if not points.pieces:
        yield from ((begin, begin + step, None) for begin in range(0, in_size, step))
        return
    for begin in range(0, in_size, CODE_GROUP):
        for points_CW in points.pieces:
            yield begin, begin + points_CW.shape[1], points_CW
            begin += points_CW.shape[1]


def best_path(target_RW: Tensor, past_R: Tensor) -> Tensor:
    """The states [R, W] of `TRELLIS` of least squared error to the targets, after the state `past`; Viterbi's algorithm.

    State s follows state p when s >> 2 is p & 63: of the four states that lead to the same four, only the best so far is kept.
    """
    rows, width = target_RW.shape
    entries = TRELLIS.float().view(1, 64, 4)
    squares, doubles = entries.square(), -2 * entries  # (x - e)^2 without x^2, which all paths share
    cost_RS = torch.full((rows, 256), float("inf")).scatter_(1, past_R[:, None], 0.0)
    kept = torch.empty(width, rows, 64, dtype=torch.uint8)
    for t in range(width):
        a, b, c, d = cost_RS.view(rows, 4, 64).unbind(1)
        first, second = torch.minimum(a, b), torch.minimum(c, d)
        torch.where(second < first, (d < c).to(torch.uint8) + 2, (b < a).to(torch.uint8), out=kept[t])
        least = torch.minimum(first, second)
        cost_RS = torch.addcmul(squares, target_RW[:, t, None, None], doubles).add_(least[:, :, None]).view(rows, 256)
    state_R = cost_RS.argmin(1)
    path_RW = torch.empty(rows, width, dtype=torch.long)
    for t in range(width - 1, -1, -1):
        path_RW[:, t] = state_R
        low_R = state_R >> 2
        state_R = low_R + 64 * kept[t].gather(1, low_R[:, None])[:, 0].long()
    return path_RW


def _packed(numbers: list[Tensor], local_RG: Tensor, code: str) -> Tensor:
    """The bytes of the rows, uint8 [R, B]."""
    rows, groups = local_RG.shape
    if code == "ccq2.5":
        number = torch.stack(numbers, dim=1).view(rows, groups, 19)
        sevens = number[..., 0:18:2] << 9 | number[..., 1:18:2]
        words = torch.cat((sevens, number[..., 18:] << 13 | local_RG[..., None]), dim=-1)
        return torch.stack((words & 255, words >> 8), dim=-1).to(torch.uint8).view(rows, -1)
    if code == "ccq2.06":
        codes = torch.stack(numbers, dim=1)
    else:
        symbols = (torch.cat(numbers, dim=1) & 3).view(rows, -1, 4)
        codes = symbols[..., 0] << 6 | symbols[..., 1] << 4 | symbols[..., 2] << 2 | symbols[..., 3]
    pairs = torch.nn.functional.pad(local_RG, (0, groups % 2)).view(rows, -1, 2)
    return torch.cat((codes.to(torch.uint8), (pairs[..., 0] << 4 | pairs[..., 1]).to(torch.uint8)), dim=1)
