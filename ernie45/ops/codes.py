"""Weights of about two bits: how stored bytes become whole numbers and scales. The encoders stand in `quant/ccq.py`.

A matrix [O, I], I filled up to groups of 64 inputs, is stored row by row as bytes and a few float16 constants, the last of them `super`:

    ccq2.06   a byte b for 4 weights: c = floor(b * code_scale + code_zero + 1/2), of which four windows of 6 bits at 9, 6, 3 and 0 are the
              weights, each - 32; neighbours share 3 bits. Constants: code_scale, code_zero, super
    ccq2.5    ten words of 16 bits, low byte first, for 64 weights: words 0 to 8 hold seven windows of 3 bits at 13, 11, 9, 6, 4, 2 and 0,
              each - 4, neighbours sharing one bit in two chains; word 9 the last weight at 13 and the group's local scale in 13 bits
    tcq2.06   2 bits a weight, four to a byte, first in the high bits; a weight is the entry of `TRELLIS` that it and the three before it
              name (0 before the row begins): each weight adds 2 new bits and shares 6 with its neighbour

After the codes, ccq2.06 and tcq2.06 have the local scales, 4 bits a group, first in the high half; scale = local / 16 * super (ccq2.5:
local / 8192 * super), rounded to float16. The first two are convolutional codes as in CCQ (arXiv 2507.07145), the third is our own: it is
decoded as freely, every weight by itself from one window of bits, and loses a quarter less than ccq2.06.

Letters: O and I out- and input widths, G groups, B bytes of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CODE_GROUP = 64
"""Inputs that share a local scale."""
CODES = ("ccq2.06", "ccq2.5", "tcq2.06")
WINDOWS_OF_6 = (9, 6, 3, 0)
CHAIN_OF_3, CHAIN_OF_4 = (4, 2, 0), (6, 4, 2, 0)
LOCAL_STEPS = {"ccq2.06": 16, "ccq2.5": 8192, "tcq2.06": 16}
"""Local scales are whole numbers from 1 to one less than this."""
_CONSTANTS = {"ccq2.06": 3, "ccq2.5": 1, "tcq2.06": 1}

# Entry s: the whole number for the symbols s >> 6, s >> 4 & 3, s >> 2 & 3 and s & 3, oldest first. Found by Lloyd's algorithm from a random
# order of the quantiles: normal numbers are encoded, and each entry becomes the mean of what chose it, again and again.
TRELLIS = torch.tensor([
    17, -43, 56, -24, 87, 48, 27, -12, 27, 81, -31, 4, 42, -32, -48, -73, -28, 54, -79, 1, 3, -53, -93, 43, -16, 58,
    -47, 17, 70, 15, -47, 6, -43, 41, 19, 19, -58, 17, 89, -18, 45, 26, -12, -127, -26, 2, -34, 35, -11, -66, -17, 3,
    37, 76, -27, 30, -98, -58, 33, -13, -34, 53, 15, -70, 82, 9, 21, -7, -76, 13, -30, 28, 84, -16, -16, 54, 15, 34,
    -8, -10, 16, -43, -15, -18, 2, -102, -41, 43, 9, 44, -41, -33, 20, 37, -27, 75, -13, -61, -56, 45, 35, -52, 64, -1,
    -14, 6, -49, -17, 75, 46, -83, 112, 16, 27, 5, -36, -29, -15, 113, 16, -11, -31, 0, -60, 65, 11, 55, -35, 1, -34,
    50, 45, 42, 76, 114, -7, -58, -37, 34, -91, -55, -27, -104, 24, 59, 2, 29, 9, -31, 15, 32, -78, -100, -7, -9, 47,
    -37, -76, 44, -15, 50, -4, 72, -14, -105, -13, 8, -47, 10, -51, 8, 35, 3, -25, -59, 26, 127, -15, 27, -70, 23, 38,
    -22, -12, 19, 68, 17, -36, 46, -27, -67, 10, 5, 75, -35, 22, 13, -20, -7, -76, -19, 13, -61, 74, -3, -67, 43, -42,
    19, -53, -43, 51, -29, 16, 73, 4, -58, 3, 28, -15, -6, 63, -13, 44, 34, 0, -3, 82, -1, -24, 57, 30, -5, 31,
    -25, -46, 32, 5, -30, 65, -52, -14, 26, -45, -71, -13, 19, -39, -54, -10, 82, 16, 25, -9, -33, -9,
], dtype=torch.int8)  # fmt: skip


class CodedWeight(NamedTuple):
    """A coded matrix: `values` uint8 [O, B] and `scales` float16 [O, constants], as above."""

    values: Tensor
    scales: Tensor


class Decoded(NamedTuple):
    """Whole numbers int8 [O, I filled up], and float32 scales [O, G] that are exact in float16."""

    whole_OI: Tensor
    scales_OG: Tensor


def coded_shapes(code: str, out_size: int, in_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `values` and `scales`."""
    groups = -(-in_size // CODE_GROUP)
    row = groups * 20 if code == "ccq2.5" else groups * CODE_GROUP // 4 + -(-groups // 2)
    return (out_size, row), (out_size, _CONSTANTS[code])


def decode(weight: CodedWeight, code: str, in_size: int) -> Decoded:
    """What the bytes stand for; every pattern of bytes stands for something."""
    groups = -(-in_size // CODE_GROUP)
    if code == "ccq2.5":
        whole_OI, local_OG = _chains(weight.values, groups)
    else:
        codes, local_OG = weight.values[:, : groups * CODE_GROUP // 4], _nibbles(weight.values[:, groups * CODE_GROUP // 4 :], groups)
        whole_OI = _clusters(codes, weight.scales) if code == "ccq2.06" else _trellis(codes)
    return Decoded(whole_OI.to(torch.int8), code_scales(local_OG, weight.scales[:, -1], code))


def code_scales(local_OG: Tensor, super_O: Tensor, code: str) -> Tensor:
    """The scales of the groups from local and super scale, float32 [O, G]."""
    return (local_OG.float() / LOCAL_STEPS[code] * super_O.float()[:, None]).to(torch.float16).float()


def cluster_points(code_scale: Tensor, code_zero: Tensor) -> Tensor:
    """The four whole numbers of every byte under the constants [..] of a row of ccq2.06, float32 [.., 256, 4]."""
    return _windows(torch.arange(256).float(), code_scale[..., None], code_zero[..., None])


def _clusters(codes: Tensor, constants: Tensor) -> Tensor:
    return _windows(codes.float(), constants[:, :1].float(), constants[:, 1:2].float()).flatten(1)


def _windows(byte: Tensor, code_scale: Tensor, code_zero: Tensor) -> Tensor:
    point = (byte * code_scale.float() + code_zero.float() + 0.5).floor().nan_to_num(0, 0, 0).clamp(0, 32767).to(torch.int32)
    return torch.stack([((point >> shift) & 63) - 32 for shift in WINDOWS_OF_6], dim=-1).float()


def _chains(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    pair = values.view(-1, groups, 10, 2).to(torch.int32)
    word = pair[..., 0] | pair[..., 1] << 8
    seven = torch.stack([(word[..., :9] >> shift) & 7 for shift in (13, 11, 9, 6, 4, 2, 0)], dim=-1).flatten(2)
    whole = torch.cat((seven, word[..., 9:] >> 13), dim=-1) - 4
    return whole.flatten(1), word[..., 9] & 8191


def _trellis(codes: Tensor) -> Tensor:
    symbols = torch.stack([(codes >> shift) & 3 for shift in (6, 4, 2, 0)], dim=-1).flatten(1).long()
    before = torch.nn.functional.pad(symbols, (3, 0))
    length = symbols.shape[1]
    state = sum(before[:, place : place + length] << 2 * (3 - place) for place in range(4))
    assert isinstance(state, Tensor)
    return TRELLIS[state]


def _nibbles(packed: Tensor, groups: int) -> Tensor:
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)[:, :groups]
