"""Checkpoints of random weights: they load, they are what was asked for, and they appear whole or not at all."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from ernie45 import ops
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.load import load_model
from ernie45.models.random_weights import write_random
from ernie45.models.released import tiny
from ernie45.quant.spec import QuantSpec

DENSE, EXPERTS = tiny(vocab_size=1040, num_mtp=1), replace(tiny(experts=True), tie_embeddings=False)


def silent(name, done, total):
    assert 0 <= done < total


def write(config, folder, **settings):
    return write_random(config, folder, told=silent, **settings)


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_weights_are_drawn_as_a_new_model_is(tmp_path, config, dtype):
    nbytes = write(config, tmp_path / "m", dtype=dtype)
    decoder = load_model(tmp_path / "m", dtype="float32")
    assert decoder.config == config
    values = decoder.state_dict()
    assert nbytes == sum(v.numel() * (4 if ".router." in name else dtype.itemsize) for name, v in values.items())
    for name, value in values.items():
        if name.endswith("norm.weight"):
            assert bool((value == 1).all())
        elif name.endswith("bias"):
            assert not value.any()
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.2), name
    drawn = [value.flatten()[:8] for name, value in values.items() if value.dim() > 1]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn), "two matrices were drawn alike"


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8", "w8a8-g64", "w8a8"])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_packed_weights_load_and_compute(tmp_path, config, scheme):
    write(config, tmp_path / "m", spec=QuantSpec.uniform(scheme), dtype=torch.float32)
    decoder = load_model(tmp_path / "m")
    logits_TV = decoder.prompt_logits([3, 5, 7])
    assert logits_TV.shape == (3, config.vocab_size)
    assert bool(logits_TV.isfinite().all())
    assert float(logits_TV.std()) > 0
    matrix = ops.dequantise(decoder.layers[0].attn.qkv.weight)
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.1)
    if config.experts:
        gate_up = decoder.layers[1].ffn.experts.gate_up_packed
        assert not torch.equal(gate_up[0], gate_up[1])
    else:
        assert len({bytes(block.numpy()) for block in decoder.embed.weight_packed[:, 0]}) == 65, "no two tokens are alike"


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(EXPERTS, tmp_path / name, spec=QuantSpec.uniform("w4a8-g32"), seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_nothing_is_left_where_it_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write(DENSE, tmp_path / "there")
    with pytest.raises(ConfigError, match="fits no module"):
        write(DENSE, tmp_path / "m", spec=QuantSpec.from_dict({"rules": [{"pattern": "layer.*", "scheme": "w4a8"}]}, "spec"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    with pytest.raises(CheckpointError, match="1,000 free"):
        write(DENSE, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted(name, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random(DENSE, tmp_path / "m", told=interrupted)
    assert list(tmp_path.iterdir()) == []
