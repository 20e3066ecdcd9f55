"""Saving: a complete new folder, or none."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.models.load import load_model
from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder


@pytest.fixture
def decoder():
    return Decoder(tiny(experts=True)).initialise(torch.Generator().manual_seed(0))


def test_another_type_on_disk_keeps_the_router_exact(tmp_path, decoder):
    save_model(decoder, tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = load_model(tmp_path / "m", dtype="float32").state_dict()
    for name, tensor in decoder.state_dict().items():
        expected = tensor if ".router." in name else tensor.bfloat16().float()
        assert torch.equal(back[name], expected), name


def test_companions_come_along(tmp_path, decoder):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.bin").write_text("no")
    save_model(decoder, tmp_path / "new" / "m", companions=source)
    assert sorted(path.name for path in (tmp_path / "new" / "m").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_an_occupied_place_is_left_alone(tmp_path, decoder):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    for place in (tmp_path / "m", tmp_path / "m" / "notes.txt"):
        with pytest.raises(CheckpointError, match="choose another name"):
            save_model(decoder, place)
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "notes.txt"]
    (tmp_path / "empty").mkdir()
    save_model(decoder, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_no_room_leaves_nothing(tmp_path, decoder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="the disk has 10 free"):
        save_model(decoder, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["gguf", "onnx"])
def test_layouts_that_are_no_folder(tmp_path, decoder, layout):
    with pytest.raises(CheckpointError, match="allowed: pt, fused, paddle"):
        save_model(decoder, tmp_path / "m", layout=layout)


def test_a_place_that_cannot_be_written(tmp_path, decoder):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model(decoder, tmp_path / "file" / "m")
