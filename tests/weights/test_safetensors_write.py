"""Writing safetensors: what the reference package reads back, whole or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ernie45.errors import CheckpointError
from ernie45.weights.safetensors import DTYPES, INDEX_NAME, open_safetensors
from ernie45.weights.safetensors_write import TensorSpec, check_room, save_safetensors, write_safetensors


def test_the_reference_package_reads_every_type(tmp_path):
    tensors = {name: (torch.arange(6 * kind.itemsize, dtype=torch.uint8) % 2).view(kind).reshape(2, 3) for name, kind in DTYPES.items()}
    tensors |= {"none": torch.empty(0, 2), "one": torch.tensor(1.5), "strided": torch.arange(6.0).reshape(2, 3).T}
    (path,) = save_safetensors(tmp_path, tensors.items())
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))
    assert open_safetensors(path).metadata == {"format": "pt"}


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 200))
def test_shards_hold_everything_once(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards") / "new"
    tensors = {f"t.{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    files = save_safetensors(folder, tensors.items(), shard_bytes=limit)
    assert (folder / INDEX_NAME).exists() == (len(files) > 1)
    assert sorted(path.name for path in folder.iterdir()) == sorted([f.name for f in files] + [INDEX_NAME] * (len(files) > 1))
    read = open_safetensors(folder)
    assert sorted(read) == sorted(tensors)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())
    if len(files) > 1:
        assert json.loads((folder / INDEX_NAME).read_text())["metadata"]["total_size"] == 4 * sum(sizes)
        for path in files:
            here = [read.info(name).nbytes for name in read if read.info(name).file == path]
            assert sum(here) <= limit or sum(1 for size in here if size) == 1


def test_tensors_are_made_one_at_a_time_in_aligned_order(tmp_path):
    asked = []

    def produce(name):
        asked.append(name)
        return torch.ones(3, dtype=kinds[name])

    kinds = {"b": torch.int8, "w": torch.bfloat16, "f": torch.float32}
    write_safetensors(tmp_path, [TensorSpec(name, kind, (3,)) for name, kind in kinds.items()], produce)
    assert asked == ["f", "w", "b"]


def test_a_failure_leaves_nothing(tmp_path):
    def produce(name):
        if name == "b":
            raise KeyboardInterrupt
        return torch.ones(3)

    specs = [TensorSpec(name, torch.float32, (3,)) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, specs, produce, shard_bytes=12)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"4,\d\d\d bytes are to be written and the disk has 1,000 free"):
        save_safetensors(tmp_path, [("a", torch.ones(1000))])
    assert list(tmp_path.iterdir()) == []
    check_room(tmp_path, 1000)


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="became full"):
        save_safetensors(tmp_path, [("a", torch.ones(3))])
    assert list(tmp_path.iterdir()) == []


def test_old_weights_are_not_mixed_with_new(tmp_path):
    save_safetensors(tmp_path, [("a", torch.ones(1))])
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds weights already"):
        save_safetensors(tmp_path, [("a", torch.zeros(1))])
    assert (tmp_path / "model.safetensors").read_bytes() == before
