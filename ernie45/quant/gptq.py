"""GPTQ: rounding that sends the error of each column to the columns after it, so that the *output* of the matrix moves least.

For inputs x with Gram matrix H = sum x x^T, replacing W by Q costs tr((W - Q) H (W - Q)^T). Columns are rounded one by one; what column j
lost is spread over the later ones by row j of the upper Cholesky factor of H^-1 (Frantar et al. 2022, arXiv 2210.17323). Added here:

- columns with the largest inputs go first although groups stay where they are ("static groups"): the packed format has no index of groups;
- scales are searched with the error weighted by the inputs' energy, and after rounding they are fitted again by least squares under H,
  all groups of a row together, and the rounding is done once more; of the rounds and rounding to nearest, each row keeps the best;
- after each rounding every whole number is gone over again (coordinate descent), now that all the others are known.

Letters: O and I out- and input widths, G groups of inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ernie45.quant.pack import group_width

_BLOCK = 128  # columns whose updates of the rest are gathered into one product
_CLIPS = tuple(0.5 + 0.05 * i for i in range(11))
_SMALLEST_SCALE = 6.2e-5  # the least normal float16: below it a scale loses digits


class Rounded(NamedTuple):
    """Whole numbers int8 [O, I], scales float32 [O, G] (exact in float16), and the error of the output, sum over the rows' H-norms."""

    whole_OI: Tensor
    scales_OG: Tensor
    error: float


@dataclass(frozen=True, kw_only=True)
class GptqSettings:
    """`damping`: this share of the mean diagonal is added to H. `by_energy`: large inputs first. `rounds`: how often is rounded, scales
    fitted in between. `correction`: how much of the earlier matrices' errors is made up for, 0 (nothing) to 1.
    """

    damping: float = 0.01
    by_energy: bool = True
    rounds: int = 2
    correction: float = 1.0
    descents: int = 2


def largest_whole(bits: int) -> int:
    """The upper end of the range: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def smallest_whole(bits: int) -> int:
    """The lower end: -8 for 4 bits, where a sixteenth value is worth a scale of either sign, and -127 for 8."""
    return -8 if bits == 4 else -127


def in_groups(matrix_OI: Tensor, group: int) -> Tensor:
    """[O, I] -> [O, G, group width], the last group filled up with zeros."""
    width = group_width(matrix_OI.shape[1], group)
    return torch.nn.functional.pad(matrix_OI, (0, -matrix_OI.shape[1] % width)).unflatten(1, (-1, width))


def spread(scales_OG: Tensor, in_size: int, group: int) -> Tensor:
    """The scale of every element, [O, I]."""
    return scales_OG.repeat_interleave(group_width(in_size, group), dim=1)[:, :in_size]


def storable(scales_OG: Tensor) -> Tensor:
    """Scales as float16 keeps them, never zero; the sign stays."""
    size_OG = scales_OG.abs().clamp(min=_SMALLEST_SCALE)
    return torch.where(scales_OG < 0, -size_OG, size_OG).to(torch.float16).float()


def weighted_scales(weight_OI: Tensor, energy_I: Tensor, bits: int, group: int) -> Tensor:
    """Scales [O, G] of least squared error, inputs weighted by `energy` (the diagonal of H; ones for no data), clipped by .5 to 1.

    At 4 bits a negative scale puts -8 on the positive side.
    """
    grouped_OGW = in_groups(weight_OI, group)
    energy_GW = in_groups(energy_I[None], group)[0]
    full_OG = grouped_OGW.abs().amax(-1) / largest_whole(bits)
    signs = (1, -1) if bits == 4 else (1,)
    best_OG, least_OG = storable(full_OG), torch.full_like(full_OG, float("inf"))
    for factor in (sign * clip for sign in signs for clip in _CLIPS):
        scales_OG = storable(full_OG * factor)
        lost = grouped_OGW - _whole(grouped_OGW, scales_OG[..., None], bits) * scales_OG[..., None]
        error_OG = torch.einsum("ogw,ogw,gw->og", lost, lost, energy_GW)
        better = error_OG < least_OG
        best_OG = torch.where(better, scales_OG, best_OG)
        least_OG = torch.where(better, error_OG, least_OG)
    return best_OG


def to_nearest(weight_OI: Tensor, scales_OG: Tensor, bits: int, group: int) -> Tensor:
    """Whole numbers int8 [O, I] by rounding to nearest."""
    return _whole(weight_OI, spread(scales_OG, weight_OI.shape[1], group), bits).to(torch.int8)


def _whole(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (values / scales).round_().clamp_(smallest_whole(bits), largest_whole(bits))


def restored(rounded: Rounded, group: int) -> Tensor:
    """The matrix the whole numbers stand for, float32 [O, I]."""
    return rounded.whole_OI.float() * spread(rounded.scales_OG, rounded.whole_OI.shape[1], group)


def output_errors(lost_OI: Tensor, gram_II: Tensor) -> Tensor:
    """What the outputs lose, per row: diag(L H L^T), [O]."""
    return ((lost_OI @ gram_II) * lost_OI).sum(1)


def round_to_nearest(weight_OI: Tensor, gram_II: Tensor, bits: int, group: int) -> Rounded:
    """Round to nearest with searched scales; the yardstick of the other methods."""
    scales_OG = weighted_scales(weight_OI, gram_II.diagonal(), bits, group)
    rounded = Rounded(to_nearest(weight_OI, scales_OG, bits, group), scales_OG, 0.0)
    return rounded._replace(error=float(output_errors(weight_OI - restored(rounded, group), gram_II).sum()))


def corrected(weight_OI: Tensor, gram_II: Tensor, cross_II: Tensor, settings: GptqSettings) -> Tensor:
    """W' whose outputs for the inputs x it will see are nearest to W's for the original inputs x', drawn to W by the damping.

    W' = W + c W (C - H) (H + d)^-1 with H = sum x x^T, C = sum x' x^T and c the correction.
    """
    if not settings.correction:
        return weight_OI
    gram = gram_II.double()
    damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (settings.damping * float(gram.diagonal().mean()) + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return weight_OI
    moved_IO = torch.cholesky_solve((weight_OI.double() @ (cross_II.double() - gram)).t(), lower)
    return (weight_OI + settings.correction * moved_IO.t()).float()


def gptq(weight_OI: Tensor, gram_II: Tensor, bits: int, group: int, settings: GptqSettings) -> Rounded:
    """Quantise a float32 matrix for inputs with Gram matrix H, both float32. Inputs that never occurred are rounded to nearest."""
    order_I, factor_II = _elimination(gram_II, settings)
    scales_OG = weighted_scales(weight_OI, gram_II.diagonal(), bits, group)
    best = Rounded(to_nearest(weight_OI, scales_OG, bits, group), scales_OG, 0.0)
    errors_O = output_errors(weight_OI - restored(best, group), gram_II)
    for turn in range(settings.rounds):
        whole_OI = _spread_errors(weight_OI, scales_OG, order_I, factor_II, bits, group)
        for _ in range(settings.descents):
            whole_OI = descended(weight_OI, whole_OI, scales_OG, gram_II, bits, group)
        best, errors_O = _better_rows(best, errors_O, weight_OI, whole_OI, scales_OG, gram_II, group)
        if turn + 1 < settings.rounds:
            # the fit helps the whole numbers it was made for, and rounding anew under it mostly helps more: both are candidates
            scales_OG = fitted_scales(weight_OI, whole_OI, scales_OG, gram_II, group)
            best, errors_O = _better_rows(best, errors_O, weight_OI, whole_OI, scales_OG, gram_II, group)
    return best._replace(error=float(errors_O.sum()))


def _better_rows(
    best: Rounded, errors_O: Tensor, weight_OI: Tensor, whole_OI: Tensor, scales_OG: Tensor, gram_II: Tensor, group: int
) -> tuple[Rounded, Tensor]:
    """Row by row the candidate or what was best before, with the rows' errors."""
    candidate = Rounded(whole_OI, scales_OG, 0.0)
    new_O = output_errors(weight_OI - restored(candidate, group), gram_II)
    better_O1 = (new_O < errors_O)[:, None]
    whole = torch.where(better_O1, whole_OI, best.whole_OI)
    return Rounded(whole, torch.where(better_O1, scales_OG, best.scales_OG), 0.0), torch.minimum(new_O, errors_O)


def _elimination(gram_II: Tensor, settings: GptqSettings) -> tuple[Tensor, Tensor]:
    """The order of the columns and the upper Cholesky factor of H^-1 in that order.

    Float64 throughout: H of a real layer has condition numbers of 1e6 and more. Damping grows until the factorisation succeeds.
    """
    gram = gram_II.double()
    diagonal_I = gram.diagonal().clone()
    order_I = diagonal_I.argsort(descending=True, stable=True) if settings.by_energy else torch.arange(len(gram))
    mean = float(diagonal_I.mean()) or 1.0
    gram = gram[order_I][:, order_I]
    damping = settings.damping
    while True:
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return order_I, upper.float()
        assert damping < 100, "a Gram matrix with NaN gets no statistics this far"
        damping = max(damping * 10, 1e-6)


def _spread_errors(weight_OI: Tensor, scales_OG: Tensor, order_I: Tensor, factor_II: Tensor, bits: int, group: int) -> Tensor:
    """One pass over the columns under fixed scales, int8 [O, I]."""
    O, I = weight_OI.shape  # noqa: E741
    rest_IO = weight_OI.t()[order_I].contiguous()
    scales_IO = spread(scales_OG, I, group).t()[order_I].contiguous()
    whole_IO = torch.empty(I, O)
    for begin in range(0, I, _BLOCK):
        end = min(begin + _BLOCK, I)
        block = rest_IO[begin:end]
        errors = torch.empty_like(block)
        factor = factor_II[begin:end, begin:end]
        for j in range(end - begin):
            whole_O = _whole(block[j], scales_IO[begin + j], bits)
            whole_IO[begin + j] = whole_O
            errors[j] = (block[j] - whole_O * scales_IO[begin + j]) / factor[j, j]
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        rest_IO[end:] -= factor_II[begin:end, end:].t() @ errors
    whole_OI = torch.empty(O, I, dtype=torch.int8)
    whole_OI[:, order_I] = whole_IO.t().to(torch.int8)
    return whole_OI


def descended(weight_OI: Tensor, whole_OI: Tensor, scales_OG: Tensor, gram_II: Tensor, bits: int, group: int) -> Tensor:
    """One pass of coordinate descent, int8 [O, I]: each whole number in turn moves to where the output error of its row is least.

    GPTQ fixes a column before it sees what the later ones do; this goes back to it. With R = W - Q and P = R H, column j of Q is best
    moved by P_j / H_jj; the error never grows (Chee et al. 2023, arXiv 2307.13304, call it greedy updates).
    """
    I = weight_OI.shape[1]  # noqa: E741
    whole_IO = whole_OI.t().float()
    scales_IO = spread(scales_OG, I, group).t().contiguous()
    pull_IO = gram_II @ (weight_OI.t() - whole_IO * scales_IO)
    energy_I = gram_II.diagonal().clamp(min=1e-30)
    for begin in range(0, I, _BLOCK):
        end = min(begin + _BLOCK, I)
        block, near_II = pull_IO[begin:end], gram_II[begin:end, begin:end].contiguous()
        before_IO = whole_IO[begin:end].clone()
        for j in range(end - begin):
            place = begin + j
            scale_O = scales_IO[place]
            moved_O = _whole(whole_IO[place] * scale_O + block[j] / energy_I[place], scale_O, bits)
            block.addr_(near_II[j], (moved_O - whole_IO[place]) * scale_O, alpha=-1)
            whole_IO[place] = moved_O
        if end < I:
            pull_IO[end:] -= gram_II[end:, begin:end] @ ((whole_IO[begin:end] - before_IO) * scales_IO[begin:end])
    return whole_IO.t().to(torch.int8).contiguous()


def fitted_scales(weight_OI: Tensor, whole_OI: Tensor, scales_OG: Tensor, gram_II: Tensor, group: int) -> Tensor:
    """Scales that minimise the output error for given whole numbers, all groups of a row together: a G x G system per row.

    With q_g the whole numbers of group g (zero elsewhere): A_gh = q_g^T H q_h, b_g = q_g^T H w, s = A^-1 b. A row whose solution is not
    finite, or changes a sign, keeps its scales.
    """
    whole = whole_OI.float()
    grouped = in_groups(whole, group)
    G = grouped.shape[1]
    width = grouped.shape[2]
    system_OGG = torch.stack(
        [
            in_groups((whole[:, h * width : (h + 1) * width] @ gram_II[h * width : (h + 1) * width]) * whole, group).sum(-1)
            for h in range(G)
        ],
        dim=2,
    ).double()
    wanted_OG = in_groups((weight_OI @ gram_II) * whole, group).sum(-1).double()
    # a ridge towards the present scales keeps groups without energy where they are
    ridge_O = system_OGG.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * 1e-6
    system_OGG += torch.diag_embed(ridge_O[:, None].expand(-1, G))
    wanted_OG = wanted_OG + ridge_O[:, None] * scales_OG.double()
    solved_OG, _ = torch.linalg.solve_ex(system_OGG, wanted_OG)
    sound_O1 = ((solved_OG * scales_OG > 0) & (solved_OG.abs() < 60000)).all(1, keepdim=True)
    return storable(torch.where(sound_O1, solved_OG.float(), scales_OG))
