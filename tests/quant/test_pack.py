"""The packed format: there and back, what it documents, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.ops import quantised
from ernie45.quant.pack import group_width, pack, packed_shapes, unpacked


@given(
    out_size=st.integers(1, 60),
    in_size=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_packing_there_and_back(out_size, in_size, bits, group, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    whole = torch.randint(low, high, (out_size, in_size), generator=generator).to(torch.int8)
    scales = torch.rand(out_size, -(-in_size // group_width(in_size, group)), generator=generator).half().float()
    packed = pack(whole, scales, bits, group)
    assert (tuple(packed.values.shape), tuple(packed.scales.shape)) == packed_shapes(out_size, in_size, bits, group)
    back, scales_back = unpacked(packed, in_size)
    assert torch.equal(back, whole)
    assert torch.equal(scales_back, scales)
    want = whole.float() * scales.repeat_interleave(packed.group, 1)[:, :in_size]
    assert torch.equal(quantised.dequantise(packed)[:, :in_size], want)
    rows = torch.randint(0, out_size, (5,), generator=generator)
    assert torch.equal(quantised.dequantise_rows(packed, rows)[:, :in_size], want[rows])


def test_the_documented_place_of_one_weight():
    whole = torch.zeros(32, 64, dtype=torch.int8)
    whole[17, 8 * 3 + 4 + 2] = 5  # block 1, row 1; byte group 3, high nibble, place 2
    packed = pack(whole, torch.ones(32, 1), 4, 64)
    assert packed.values[1, 3, 4 * 1 + 2] == (5 + 8) << 4 | 8
    assert (packed.values == 0x88).sum() == packed.values.numel() - 1
    packed = pack(whole, torch.ones(32, 1), 8, 64)
    assert packed.values[1, (8 * 3 + 6) // 4, 4 * 1 + 2] == 128 + 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_scale_that_is_no_number(bad):
    with pytest.raises(CheckpointError, match="scale"):
        pack(torch.ones(16, 32, dtype=torch.int8), torch.full((16, 1), bad), 4, 32)
