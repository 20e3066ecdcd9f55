"""The number formats of GGUF files: how many bytes a block takes, how it becomes float32, and how float32 becomes a block.

A row of a tensor is cut into blocks of `values` numbers stored in `size` bytes. Layouts as in ggml's `ggml-common.h`. Every decoder does
its arithmetic in float32 in the order of ggml's reference (scale by sub-scale, times code, minus offset), so results are equal to the bit.

`n` is the number of blocks handed over; a codec sees `blocks` as uint8 [n, size] and `values` as float32 [n, values].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.errors import CheckpointError


@dataclass(frozen=True)
class BlockType:
    """One number format. `decode` is None when this project cannot read it, `encode` when it cannot write it."""

    name: str
    code: int
    values: int
    size: int
    decode: Callable[[Tensor, Tensor], None] | None = None
    encode: Callable[[Tensor, Tensor], None] | None = None

    def row_bytes(self, row: int) -> int:
        """Bytes of a row of `row` numbers, which must be a multiple of `values`."""
        assert row % self.values == 0, f"a row of {row} does not divide into {self.name} blocks of {self.values}"
        return row // self.values * self.size


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _put_half(blocks: Tensor, start: int, value: Tensor) -> None:
    """Store `value` float32 [n, 1] at byte `start`, rounded to the nearest float16."""
    blocks[:, start : start + 2] = value.to(torch.float16).view(torch.uint8)


def _put_nibbles(values: Tensor, packed: Tensor) -> None:
    """Spread uint8 [n, 16] to float32 [n, 32]: low halves of the bytes first, then high halves."""
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4


# ---------------------------------------------------------------- plain numbers


def _decode_f32(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.float32))


def _encode_f32(values: Tensor, blocks: Tensor) -> None:
    blocks.copy_(values.view(torch.uint8))


def _decode_f16(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.float16))


def _encode_f16(values: Tensor, blocks: Tensor) -> None:
    blocks.copy_(values.to(torch.float16).view(torch.uint8))


def _decode_bf16(blocks: Tensor, values: Tensor) -> None:
    values.copy_(blocks.view(torch.bfloat16))


def _encode_bf16(values: Tensor, blocks: Tensor) -> None:
    blocks.copy_(values.to(torch.bfloat16).view(torch.uint8))


# ---------------------------------------------------------------- blocks of 32


def _decode_q8_0(blocks: Tensor, values: Tensor) -> None:
    """float16 scale, 32 signed bytes: value = scale * code."""
    values.copy_(blocks[:, 2:].view(torch.int8))
    values.mul_(_half(blocks, 0))


def _encode_q8_0(values: Tensor, blocks: Tensor) -> None:
    """scale = largest magnitude / 127; codes rounded half away from zero, as C's roundf does."""
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    code = values * _inverse(scale)
    magnitude = code.abs()
    whole = magnitude.floor()
    # floor(2 * fraction) is 1 from one half on: exact in float32, where floor(x + 0.5) is not
    whole += (2 * (magnitude - whole)).floor()
    _put_half(blocks, 0, scale)
    blocks[:, 2:] = whole.copysign(code).to(torch.int8).view(torch.uint8)


def _decode_q4_0(blocks: Tensor, values: Tensor) -> None:
    """float16 scale, 32 four-bit codes: value = scale * (code - 8)."""
    _put_nibbles(values, blocks[:, 2:])
    values.sub_(8).mul_(_half(blocks, 0))


def _encode_q4_0(values: Tensor, blocks: Tensor) -> None:
    """The number of largest magnitude (the first of equals) becomes code 0, so scale = that number / -8."""
    extreme = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    scale = extreme / -8
    code = (values * _inverse(scale) + 8.5).trunc_().clamp_(0, 15).to(torch.uint8)
    _put_half(blocks, 0, scale)
    blocks[:, 2:] = code[:, :16] | (code[:, 16:] << 4)


def _decode_q4_1(blocks: Tensor, values: Tensor) -> None:
    """float16 scale, float16 minimum, 32 four-bit codes: value = scale * code + minimum."""
    _put_nibbles(values, blocks[:, 4:])
    values.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _put_five_bits(values: Tensor, high: Tensor, packed: Tensor) -> None:
    """As `_put_nibbles`, with a fifth bit: bit i of the four bytes `high`, the first byte lowest, belongs to number i."""
    _put_nibbles(values, packed)
    shift = torch.arange(8, dtype=torch.uint8)[None, None, :]
    values.add_(((high[:, :, None] >> shift) & 1).view(-1, 32), alpha=16)


def _decode_q5_0(blocks: Tensor, values: Tensor) -> None:
    """float16 scale, 32 fifth bits, 32 four-bit codes: value = scale * (code - 16)."""
    _put_five_bits(values, blocks[:, 2:6], blocks[:, 6:])
    values.sub_(16).mul_(_half(blocks, 0))


def _decode_q5_1(blocks: Tensor, values: Tensor) -> None:
    """float16 scale, float16 minimum, 32 fifth bits, 32 four-bit codes: value = scale * code + minimum."""
    _put_five_bits(values, blocks[:, 4:8], blocks[:, 8:])
    values.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is no finite number: an all-zero (or vanishing) block gets code 0."""
    return torch.where(scale == 0, 0.0, 1 / scale).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


# ---------------------------------------------------------------- super-blocks of 256


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack uint8 [n, 12] into eight six-bit scales and eight six-bit minima, each uint8 [n, 8].

    Bytes 0..3 hold scales 0..3 and bytes 4..7 minima 0..3 in their low six bits; their top two bits complete scales and minima 4..7, whose
    low four bits are the halves of bytes 8..11.
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], dim=1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], dim=1)
    return scales, minima


def _scale_and_shift(blocks: Tensor, codes: Tensor) -> None:
    """Turn codes float32 [n, 8, 32] into values in place: value = (d * scale) * code - (dmin * minimum)."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes.mul_((_half(blocks, 0) * scales)[:, :, None]).sub_((_half(blocks, 2) * minima)[:, :, None])


def _decode_q4_k(blocks: Tensor, values: Tensor) -> None:
    """d, dmin, 12 bytes of six-bit scales and minima, 128 bytes of codes: bytes 32j..32j+31 hold sub-blocks 2j (low) and 2j+1 (high)."""
    packed = blocks[:, 16:].unflatten(1, (4, 1, 32))
    codes = values.view(-1, 4, 2, 32)
    codes[:, :, :1] = packed & 15
    codes[:, :, 1:] = packed >> 4
    _scale_and_shift(blocks, values.view(-1, 8, 32))


def _decode_q5_k(blocks: Tensor, values: Tensor) -> None:
    """As Q4_K, with a fifth bit: bit s of byte i of `high` belongs to number i of sub-block s."""
    high, packed = blocks[:, 16:48], blocks[:, 48:].unflatten(1, (4, 1, 32))
    low = torch.cat([packed & 15, packed >> 4], dim=2).view(-1, 8, 32)
    shift = torch.arange(8, dtype=torch.uint8)[None, :, None]
    codes = values.view(-1, 8, 32)
    codes.copy_(low | (((high[:, None, :] >> shift) & 1) << 4))
    _scale_and_shift(blocks, codes)


def _decode_q6_k(blocks: Tensor, values: Tensor) -> None:
    """128 bytes of low halves, 64 bytes of upper bit pairs, 16 signed scales, d: value = (d * scale) * (code - 32).

    Each half of the super-block (128 numbers) has 64 low bytes and 32 upper bytes. Its four runs of 32 numbers take: run 0 and 1 the low
    halves of bytes 0..31 and 32..63, run 2 and 3 their high halves; run r takes bit pair r of the upper bytes.
    """
    low = blocks[:, :128].unflatten(1, (2, 1, 64))
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 2, 4, 32)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shift) & 3
    codes = values.view(-1, 2, 4, 32)
    codes.copy_(low | (high << 4))
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    values.view(-1, 16, 16).sub_(32).mul_(scales[:, :, None])


_READABLE = (
    BlockType("F32", 0, 1, 4, _decode_f32, _encode_f32),
    BlockType("F16", 1, 1, 2, _decode_f16, _encode_f16),
    BlockType("BF16", 30, 1, 2, _decode_bf16, _encode_bf16),
    BlockType("Q8_0", 8, 32, 34, _decode_q8_0, _encode_q8_0),
    BlockType("Q4_0", 2, 32, 18, _decode_q4_0, _encode_q4_0),
    BlockType("Q4_1", 3, 32, 20, _decode_q4_1),
    BlockType("Q5_0", 6, 32, 22, _decode_q5_0),
    BlockType("Q5_1", 7, 32, 24, _decode_q5_1),
    BlockType("Q4_K", 12, 256, 144, _decode_q4_k),
    BlockType("Q5_K", 13, 256, 176, _decode_q5_k),
    BlockType("Q6_K", 14, 256, 210, _decode_q6_k),
)
# Sizes of the formats that are not read here: a listing still shows them, and their bytes are still checked against the file.
_OTHERS = (
    ("Q8_1", 9, 32, 40),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
)
BLOCK_TYPES: dict[int, BlockType] = {t.code: t for t in (*_READABLE, *(BlockType(*row) for row in _OTHERS))}
READABLE: tuple[str, ...] = tuple(t.name for t in _READABLE)
WRITABLE: tuple[str, ...] = tuple(t.name for t in _READABLE if t.encode)

# Numbers converted at a time. 128 KB of float32 stay in the second-level cache, and torch runs operations up to this size on the calling
# thread: with two busy cores its thread team was measured 20 to 100 times slower than one thread at the next larger sizes.
CHUNK_VALUES = 1 << 15


def writable_type(name: str) -> BlockType:
    """The format called `name` ("q8_0" or "Q8_0"). Raises `CheckpointError` when it cannot be written."""
    for kind in _READABLE:
        if kind.name == name.upper() and kind.encode:
            return kind
    raise CheckpointError(f"'{name}' is not a number format that can be written; allowed: {', '.join(n.lower() for n in WRITABLE)}")


def decode_into(kind: BlockType, raw: Tensor, out: Tensor) -> None:
    """Fill `out` (contiguous, any float type) from `raw` uint8 [bytes], a piece at a time, so that no second copy of the tensor exists."""
    assert kind.decode is not None
    assert out.is_contiguous()
    assert raw.numel() * kind.values == out.numel() * kind.size, "raw bytes and numbers must match"
    blocks, values = raw.view(-1, kind.size), out.view(-1, kind.values)
    step = CHUNK_VALUES // kind.values
    scratch = None if out.dtype == torch.float32 else torch.empty(min(step, len(blocks)), kind.values)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        if scratch is None:
            kind.decode(piece, values[start : start + step])
        else:
            kind.decode(piece, scratch[: len(piece)])
            values[start : start + step] = scratch[: len(piece)]


def encode(kind: BlockType, values: Tensor) -> Tensor:
    """Numbers of any float type as the bytes of `kind`: uint8 [bytes]. The last dimension must divide into blocks.

    Raises `CheckpointError` when a number is NaN or infinite, or too large for float16 where that is the format.
    """
    assert kind.encode is not None
    rows = values.contiguous().view(-1, kind.values)
    out = torch.empty(len(rows), kind.size, dtype=torch.uint8)
    step = CHUNK_VALUES // kind.values
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].float()
        if not torch.isfinite(piece).all():
            raise CheckpointError("holds NaN or infinite numbers; a model that was saved after a failed training step cannot be exported")
        if kind.name == "F16" and piece.abs().max() > 65504:
            raise CheckpointError(f"holds {piece.abs().max():.3g}, beyond float16's 65504; export as bf16 or f32 instead")
        kind.encode(piece, out[start : start + step])
    return out.view(-1)
