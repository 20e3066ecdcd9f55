"""The GGUF writer: read back by the gguf package and by our reader, whole or not at all."""

import shutil
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.weights.gguf import open_gguf
from ernie45.weights.gguf_blocks import WRITABLE, writable_type
from ernie45.weights.gguf_write import GgufSpec, write_gguf

SPECS = [GgufSpec(name.lower(), writable_type(name), (3, 64)) for name in WRITABLE] + [GgufSpec("odd", writable_type("F32"), (5,))]


def values_of(spec):
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(len(spec.name)))


def write(path, metadata=None, specs=SPECS, produce=None):
    tensors = {spec.name: values_of(spec) for spec in specs}
    return write_gguf(path, {"general.architecture": "x"} if metadata is None else metadata, specs, produce or tensors.__getitem__)


def test_the_gguf_package_reads_what_is_written(tmp_path):
    path = tmp_path / "new" / "file.gguf"
    assert write(path) == path.stat().st_size
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as ours:
        for spec in SPECS:
            tensor = theirs[spec.name]
            assert tensor.tensor_type.name == spec.type.name
            assert tuple(int(n) for n in tensor.shape) == spec.shape[::-1]
            expected = gguf.quantize(values_of(spec).numpy(), tensor.tensor_type)
            assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), expected.view(np.uint8).reshape(-1))
            assert torch.equal(ours.read(spec.name).view(-1), torch.from_numpy(gguf.dequantize(expected, tensor.tensor_type)).view(-1))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SINGLE = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    SINGLE,
    TEXTS,
    st.lists(TEXTS, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    st.lists(SINGLE, max_size=5),
    st.lists(st.booleans(), max_size=5),
)


@given(st.dictionaries(TEXTS.filter(lambda key: key != "general.alignment"), VALUES, max_size=6))
def test_metadata_comes_back_as_it_was(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("gguf") / "file.gguf"
    write_gguf(path, metadata, [], lambda name: torch.empty(0))
    found = open_gguf(path).metadata
    assert found == metadata
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in metadata.items()}


def test_an_existing_file_stays(tmp_path):
    path = tmp_path / "file.gguf"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        write(path)
    assert path.read_text() == "mine"


def test_a_failure_half_way_leaves_nothing(tmp_path):
    def produce(name):
        if name == "odd":
            raise KeyboardInterrupt
        return torch.zeros(3, 64)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file.gguf", produce=produce)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_by_tensor_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="'f32' holds NaN or infinite"):
        write(tmp_path / "file.gguf", produce=lambda name: torch.full((3, 64), float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_with_both_numbers_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(100, 93, 7))
    with pytest.raises(CheckpointError, match=r"[\d,]{3,} bytes are to be written and the disk has 7 free"):
        write(tmp_path / "file.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.out\.gguf cannot be written"):
        write(tmp_path / "file" / "out.gguf")
