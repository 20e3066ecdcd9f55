"""Every number format against the gguf package, to the bit: it is an independent reading of the same layouts."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ernie45.errors import CheckpointError
from ernie45.weights.gguf_blocks import BLOCK_TYPES, CHUNK_VALUES, READABLE, WRITABLE, decode_into, encode, writable_type

BY_NAME = {kind.name: kind for kind in BLOCK_TYPES.values()}
# numbers whose block scale is a normal float32, so that its inverse is finite in both implementations
ORDINARY = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


def finite_halves(raw, kind):
    """Random bytes as they are, but no float16 scale that is NaN or infinite: NaN payloads are not part of the promise."""
    both = [0, 2]
    places = {"F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": both, "Q5_0": [0], "Q5_1": both, "Q4_K": both, "Q5_K": both, "Q6_K": [208]}
    places = places.get(kind.name, [])
    for place in places:
        raw[:, place + 1] &= 0xBB  # one exponent bit cleared
    if kind.name == "BF16":
        raw[:, 1] &= 0xBF
    if kind.name == "F32":
        raw[:, 3] &= 0xBF
    return raw


def decoded(kind, raw, dtype=torch.float32):
    out = torch.empty(len(raw) * kind.values, dtype=dtype)
    decode_into(kind, torch.from_numpy(raw).reshape(-1), out)
    return out


@pytest.mark.parametrize("name", READABLE)
def test_random_bytes_decode_as_the_gguf_package_does(name):
    kind = BY_NAME[name]
    # more than two chunks and no whole number of them
    blocks = 2 * CHUNK_VALUES // kind.values + 7
    raw = finite_halves(np.random.default_rng(1).integers(0, 256, (blocks, kind.size), dtype=np.uint8), kind)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(-1)
    assert np.array_equal(decoded(kind, raw).numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F32"])
def test_another_float_type_is_the_float32_result_rounded_once(name):
    kind = BY_NAME[name]
    blocks = CHUNK_VALUES // kind.values + 3
    raw = finite_halves(np.random.default_rng(2).integers(0, 256, (blocks, kind.size), dtype=np.uint8), kind)
    assert torch.equal(decoded(kind, raw, torch.bfloat16), decoded(kind, raw).to(torch.bfloat16))


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=25)
@given(data=st.data())
def test_encoding_gives_the_gguf_packages_bytes(name, data):
    kind = BY_NAME[name]
    values = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 4)), 64), elements=ORDINARY))
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(-1)
    assert np.array_equal(encode(kind, torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize("name", WRITABLE)
def test_encoding_many_chunks_gives_the_gguf_packages_bytes(name):
    generator = np.random.default_rng(3)
    values = (generator.standard_normal((300, 512)) * generator.choice([1e-3, 1, 40], (300, 1))).astype(np.float32)
    values[7] = 0
    values[9, :32] = np.tile(np.float32([0.5, -0.5]), 16)  # ties: the first of equals decides the sign of a Q4_0 scale
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(-1)
    assert np.array_equal(encode(BY_NAME[name], torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize(("name", "steps"), [("Q8_0", 0.57 / 127), ("Q4_0", 1.01 / 8)])
def test_a_block_comes_back_within_its_step(name, steps):
    """Half a step of rounding, and 2^-11 from the float16 scale; in Q4_0 the far end of the range is clipped by up to a whole step."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    raw = encode(BY_NAME[name], values).numpy().reshape(-1, BY_NAME[name].size)
    error = (decoded(BY_NAME[name], raw).view(64, 256) - values).abs().view(-1, 32).amax(1)
    assert (error <= steps * values.abs().view(-1, 32).amax(1)).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_numbers_too_small_for_their_inverse_become_zero(name):
    values = torch.full((1, 32), 1e-44)
    raw = encode(BY_NAME[name], values).numpy().reshape(1, -1)
    assert decoded(BY_NAME[name], raw).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WRITABLE)
def test_numbers_that_are_none_are_refused(name, bad):
    values = torch.zeros(2, 32)
    values[1, 5] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        encode(BY_NAME[name], values)


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="65504"):
        encode(BY_NAME["F16"], torch.full((32,), 7e4))


def test_an_unknown_format_names_those_that_are_written():
    assert writable_type("q8_0") is BY_NAME["Q8_0"]
    with pytest.raises(CheckpointError, match=r"q6_k.*allowed: f32, f16, bf16, q8_0, q4_0"):
        writable_type("q6_k")


def test_sizes_are_those_of_the_gguf_package():
    theirs = {int(code): size for code, size in gguf.GGML_QUANT_SIZES.items()}
    assert {code: (kind.values, kind.size) for code, kind in BLOCK_TYPES.items()} == {code: theirs[code] for code in BLOCK_TYPES}
