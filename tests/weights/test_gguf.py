"""The GGUF reader: true files read as the gguf package wrote them, damaged and hostile files refused in time and memory."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.weights.gguf import GgufFile, open_gguf

U8, U32, TEXT, ARRAY = 0, 4, 8, 9


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def tensor(name, dims, code, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def header(values=(), tensors=(), *, version=3, num_values=None, num_tensors=None):
    """A header from (key, type, bytes) and tensor records, with counts that may lie."""
    counts = struct.pack(
        "<IQQ", version, len(tensors) if num_tensors is None else num_tensors, len(values) if num_values is None else num_values
    )
    return b"GGUF" + counts + b"".join(text(k) + struct.pack("<I", t) + v for k, t, v in values) + b"".join(tensors)


def with_data(head, size=0, alignment=32):
    return head + bytes(-len(head) % alignment + size)


@pytest.fixture
def opened(tmp_path):
    """Writes bytes to a file and opens it."""

    def build(data) -> GgufFile:
        path = tmp_path / "file.gguf"
        path.write_bytes(data)
        return open_gguf(path)

    return build


def test_a_file_of_the_gguf_package_is_read_whole(tmp_path):
    path = tmp_path / "true.gguf"
    writer = gguf.GGUFWriter(path, "ernie4_5")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -5)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 62))
    writer.add_float64("a.f64", 0.1)
    writer.add_string("a.text", "naïve ⟨文⟩")
    writer.add_array("a.words", ["one", "", "三"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.fractions", [0.25, 1.5])
    writer.add_array("a.truths", [True, False])
    values = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    writer.add_tensor("blocks", gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        assert {key: value for key, value in file.metadata.items() if key.startswith("a.")} == {
            "a.u8": 200,
            "a.i8": -3,
            "a.u16": 60000,
            "a.i16": -30000,
            "a.u32": 4_000_000_000,
            "a.i32": -5,
            "a.f32": 0.5,
            "a.bool": True,
            "a.u64": 1 << 63,
            "a.i64": -(1 << 62),
            "a.f64": 0.1,
            "a.text": "naïve ⟨文⟩",
            "a.words": ["one", "", "三"],
            "a.numbers": [1, -2, 3],
            "a.fractions": [0.25, 1.5],
            "a.truths": [True, False],
        }
        assert file.names() == list(file) == ["plain", "half", "blocks"]
        assert len(file) == 3
        assert "half" in file
        assert file.info("plain").shape == (3, 4, 64)
        assert file.type_of("blocks") == "Q8_0"
        assert torch.equal(file.read("plain"), torch.from_numpy(values))
        assert torch.equal(file.read("half", torch.float16), torch.from_numpy(values.astype(np.float16)))
        assert file.raw("blocks").numel() == 3 * 4 * 2 * 34
        expected = gguf.dequantize(file.raw("blocks").numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(file.read("blocks").numpy().reshape(-1), expected)


def test_views_are_private_and_outlive_the_file(opened, tmp_path):
    data = with_data(header(tensors=[tensor("t", [4], 0, 0)])) + struct.pack("<4f", 1, 2, 3, 4)
    file = opened(data)
    view = file.raw("t").view(torch.float32)
    file.close()
    view[0] = 9
    assert view.tolist() == [9, 2, 3, 4]
    assert (tmp_path / "file.gguf").read_bytes() == data
    with pytest.raises(AssertionError):
        file.raw("t")


def test_released_pages_are_read_again(opened):
    values = torch.arange(1 << 14, dtype=torch.float32)
    file = opened(with_data(header(tensors=[tensor("t", [1 << 14], 0, 0)])) + values.numpy().tobytes())
    assert torch.equal(file.read("t"), values)
    file.release("t")
    assert torch.equal(file.read("t"), values)


def test_version_2_is_read_and_nested_arrays_too(opened):
    nested = struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQ2B", U8, 2, 7, 8) + struct.pack("<IQ", TEXT, 1) + text("x")
    file = opened(with_data(header([("n", ARRAY, nested)], version=2)))
    assert file.metadata == {"n": [[7, 8], ["x"]]}


def test_a_missing_tensor_is_named_with_its_neighbour(opened):
    file = opened(with_data(header(tensors=[tensor("blk.0.attn_q.weight", [4], 0, 0)]), 16))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_k\.weight.*did you mean 'blk\.0\.attn_q\.weight'"):
        file.read("blk.0.attn_k.weight")


def test_a_format_that_is_not_read_can_be_listed_and_says_what_is(opened):
    file = opened(with_data(header(tensors=[tensor("t", [256], 23, 0)]), 136))
    assert file.type_of("t") == "IQ4_XS"
    with pytest.raises(CheckpointError, match=r"IQ4_XS.*supported: F32, F16, BF16, Q8_0"):
        file.read("t")


HUGE = 2**63
HOSTILE = {
    "empty": (b"", "0 bytes"),
    "other magic": (b"GGML" + bytes(60), "no GGUF file"),
    "version 1": (with_data(header(version=1)), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge key count": (header(num_values=HUGE), "announces 9223372036854775808 metadata values"),
    "huge tensor count": (with_data(header(num_tensors=HUGE), 64), "announces 9223372036854775808 tensors"),
    "key beyond the file": (header(num_values=1) + struct.pack("<Q", HUGE) + bytes(64), "the text of key 0 would take 9223372036854775808"),
    "text beyond the file": (header([("k", TEXT, struct.pack("<Q", 2**64 - 1))]) + bytes(9), "the text of 'k'"),
    "text not UTF-8": (header([("k", TEXT, text(b"\xff\xfe"))]), "'k' is not UTF-8"),
    "huge number array": (header([("k", ARRAY, struct.pack("<IQ", 12, 2**61))]), "array 'k'"),
    "huge text array": (header([("k", ARRAY, struct.pack("<IQ", TEXT, 2**61))]), "items of 'k'"),
    "huge nested array": (header([("k", ARRAY, struct.pack("<IQ", ARRAY, 2**61))]), "items of 'k'"),
    "too deep": (header([("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2000)]), "nests arrays more than 4 deep"),
    "unknown value type": (header([("k", 13, bytes(8))]), "unknown value type 13"),
    "unknown item type": (header([("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(16))]), "unknown value type 99"),
    "key twice": (header([("k", U32, bytes(4)), ("k", U32, bytes(4))]), "'k' appears twice"),
    "cut in a number": (header([("k", U32, bytes(2))]), "a number would take 4 bytes"),
    "five dimensions": (header(tensors=[tensor("t", [1] * 5, 0, 0)]), "5 dimensions"),
    "huge dimension count": (header(tensors=[text("t") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "4294967295 dimensions"),
    "dimension 0": (with_data(header(tensors=[tensor("t", [0, 4], 0, 0)]), 64), "empty shape"),
    "dims overflow": (with_data(header(tensors=[tensor("t", [2**32, 2**32, 2**32], 0, 0)]), 64), "ends at byte"),
    "dims wrap to 0": (with_data(header(tensors=[tensor("t", [2**33, 2**31], 0, 0)]), 64), "ends at byte"),
    "unknown type": (with_data(header(tensors=[tensor("t", [4], 77, 0)]), 64), "unknown type number 77"),
    "row no block": (with_data(header(tensors=[tensor("t", [33], 8, 0)]), 64), "rows of 33 numbers"),
    "offset outside": (with_data(header(tensors=[tensor("t", [4], 0, 1 << 40)]), 64), "ends at byte"),
    "offset wraps": (with_data(header(tensors=[tensor("t", [4], 0, 2**64 - 32)]), 64), "ends at byte"),
    "offset unaligned": (with_data(header(tensors=[tensor("t", [4], 0, 4)]), 64), "no multiple of the alignment 32"),
    "cut data": (with_data(header(tensors=[tensor("t", [4], 0, 0)]), 15), "was the download cut short"),
    "overlap": (with_data(header(tensors=[tensor("a", [16], 0, 0), tensor("b", [8], 0, 32)]), 96), "'a' and 'b' overlap"),
    "same place": (with_data(header(tensors=[tensor("a", [4], 0, 0), tensor("b", [4], 0, 0)]), 96), "'a' and 'b' overlap"),
    "name twice": (with_data(header(tensors=[tensor("a", [4], 0, 0), tensor("a", [4], 0, 32)]), 96), "'a' appears twice"),
    "alignment 24": (with_data(header([("general.alignment", U32, struct.pack("<I", 24))]), 64), "general.alignment is 24"),
    "alignment 0": (with_data(header([("general.alignment", U32, bytes(4))]), 64), "general.alignment is 0"),
    "alignment 4": (with_data(header([("general.alignment", U32, struct.pack("<I", 4))]), 64), "general.alignment is 4"),
    "alignment huge": (with_data(header([("general.alignment", U32, struct.pack("<I", 1 << 31))]), 64), "general.alignment is 2147483648"),
    "alignment text": (with_data(header([("general.alignment", TEXT, text("32"))]), 64), "general.alignment is '32'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_reason(case, opened, tmp_path):
    data, reason = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"file\.gguf") as caught:
            opened(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value)
    assert peak < 4 << 20, "a refusal allocates next to nothing"


def test_a_sparse_file_cannot_ask_for_its_whole_size(tmp_path):
    """A terabyte of holes costs its writer nothing; a text of that length must not cost the reader memory."""
    path = tmp_path / "file.gguf"
    with path.open("wb") as file:
        file.write(header([("k", TEXT, struct.pack("<Q", 1 << 39))]))
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"header may end \(limit 64 MB\)"):
        open_gguf(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_gguf(tmp_path)


GOOD = with_data(
    header(
        [("general.alignment", U32, struct.pack("<I", 32)), ("words", ARRAY, struct.pack("<IQ", TEXT, 2) + text("a") + text("b"))],
        [tensor("a", [32, 2], 8, 0), tensor("b", [4], 0, 96)],
    ),
    96 + 16,
)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, len(GOOD)))
def test_a_mutated_file_is_read_inside_its_bounds_or_refused(tmp_path_factory, changes, length):
    """Whatever the bytes: a `CheckpointError`, or tensors that lie inside the file."""
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(data[: max(length, 24)] if length % 3 == 0 else data)
    size = path.stat().st_size
    try:
        file = open_gguf(path)
    except CheckpointError:
        return
    for name in file:
        info = file.info(name)
        assert info.start >= 0
        assert info.start + info.size <= size
        if info.type.decode:
            assert file.read(name).shape == info.shape
