"""Reading safetensors: equal to the reference package, in place, and unmoved by hostile files."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ernie45.errors import CheckpointError
from ernie45.weights.safetensors import DTYPES, INDEX_NAME, open_safetensors


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def sharded(folder, weight_map, **shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_every_type_equals_the_reference_package(tmp_path):
    tensors = {name: (torch.arange(6 * kind.itemsize, dtype=torch.uint8) % 2).view(kind).reshape(2, 3) for name, kind in DTYPES.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with open_safetensors(tmp_path / "a.safetensors") as files:
        assert sorted(files.names()) == sorted(tensors)
        assert files.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            got = files.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_tensors_are_views_that_never_reach_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = open_safetensors(tmp_path)
        first, again = files.read("a"), files.read("a")
    assert first.data_ptr() == again.data_ptr()
    first.fill_(7)
    assert again.tolist() == [7] * 4
    files.close()
    assert first.tolist() == [7] * 4, "a view outlives its file"
    assert path.read_bytes() == before


def test_released_pages_come_back_as_the_file_has_them(tmp_path):
    save_file({"a": torch.arange(100_000.0)}, tmp_path / "model.safetensors")
    files = open_safetensors(tmp_path)
    view = files.read("a")
    view[50_000] = -1
    files.release("a")
    assert view[50_000] == 50_000


def test_a_tensor_off_its_alignment_is_copied(tmp_path):
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = write(tmp_path / "x.safetensors", text, b"\1" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert open_safetensors(path).read("b").tolist() == [1.5, -2.0]


def test_empty_and_scalar_tensors(tmp_path):
    save_file({"none": torch.empty(0, 3), "one": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    files = open_safetensors(tmp_path)
    assert files.read("none").shape == (0, 3)
    assert files.read("one").item() == 2.5


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": entry(end=8)}, b"\0" * 8, "needs 4 bytes"),
        ({"a": entry(shape=[2**62, 4])}, b"\0" * 4, "needs"),
        ({"a": entry(begin=4, end=8)}, b"\0" * 8, "unused before it"),
        ({"a": entry(), "b": entry()}, b"\0" * 4, "overlaps"),
        ({"a": entry(begin=-4, end=0)}, b"\0" * 4, "natural numbers"),
        ({"a": entry(begin=4, end=0)}, b"\0" * 4, "natural numbers"),
        ({"a": entry(shape=[True])}, b"\0" * 4, "natural numbers"),
        ({"a": entry(shape=[1.0])}, b"\0" * 4, "natural numbers"),
        ({"a": entry(dtype="F4")}, b"\0" * 4, "allowed: BOOL"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 4, "allowed: BOOL"),
        ({"a": entry() | {"more": 1}}, b"\0" * 4, "exactly dtype"),
        ({"a": 3}, b"", "exactly dtype"),
        ({"a": entry()}, b"\0" * 9, "5 bytes after the last tensor"),
        ({"a": entry()}, b"\0" * 3, "truncated"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__"),
        (b'{"a":1,"a":2}', b"", "occurs twice"),
        (b"[1]", b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"", "not JSON"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, data, word):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=word) as caught:
        open_safetensors(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "too few"), (b"\0" * 7, "too few"), (b"\xff" * 16, "limit"), (b"\x64" + b"\0" * 20, "truncated")]
)
def test_hostile_lengths_are_refused(tmp_path, content, word):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        open_safetensors(tmp_path / "x.safetensors")


@settings(max_examples=300)
@given(st.data())
def test_no_damage_reads_outside_the_file(tmp_path_factory, data):
    """Whatever bytes change, the file is refused or every tensor lies inside it."""
    content = bytearray(save({"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) or len(content) :]
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(content)
    try:
        files = open_safetensors(path)
    except CheckpointError:
        return
    for name in files:
        assert files.read(name).untyped_storage().nbytes() <= len(content)
        files.read(name).clone()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pdparams"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    for way in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"pickle.*convert"):
            open_safetensors(way)


def test_shards_are_joined(tmp_path):
    sharded(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, s1={"a": torch.ones(1)}, s2={"b": torch.zeros(2)})
    files = open_safetensors(tmp_path)
    assert sorted(files) == ["a", "b"]
    assert files.info("b").file.name == "s2.safetensors"
    assert files.info("b").nbytes == 8
    assert "a" in files
    assert len(files) == 2


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "s1.safetensors", "b": "s9.safetensors"}, "s9.safetensors; download"),
        ({"a": "s1.safetensors", "z": "s1.safetensors"}, "'z' is listed"),
        ({"z": "s1.safetensors"}, "no file at all"),
        ({"a": "../s1.safetensors"}, "beside the index"),
        ({"a": "/etc/passwd"}, "beside the index"),
        ({"a": "..\\s1.safetensors"}, "beside the index"),
        ({"a": "s1.bin"}, "beside the index"),
        ({"a": "s\0.safetensors"}, "beside the index"),
        ({"a": 3}, "beside the index"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_indexes_that_lie_are_refused(tmp_path, weight_map, word):
    with pytest.raises(CheckpointError, match=word):
        open_safetensors(sharded(tmp_path, weight_map, s1={"a": torch.ones(1)}))


def test_two_shards_with_one_name(tmp_path):
    sharded(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, s1={"a": torch.ones(1)}, s2={"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'a' is also in s1|which .* says is in s1"):
        open_safetensors(tmp_path)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="there is: nothing"):
        open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_safetensors(tmp_path / "gone.safetensors")
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_safetensors(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files but no"):
        open_safetensors(tmp_path)


def test_an_index_and_a_single_file_that_disagree(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    sharded(tmp_path, {"a": "s1.safetensors"}, s1={"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="remove the one"):
        open_safetensors(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert open_safetensors(tmp_path).names() == ["a"]
