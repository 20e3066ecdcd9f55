"""Adapters beside a quantised model: `ernie quantize`, then `sft` or `align`, then a merge into either kind of base."""

import json

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.adapters import load_adapter
from ernie45.models.load import load, load_model
from ernie45.nn.lora import merge
from ernie45.ops import PackedWeight
from ernie45.quant.frozen import unpack_model
from ernie45.weights.safetensors import open_safetensors
from tests.recipes.lessons import COMMON, ernie, losses

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = [5, 90, 200, 17]


@pytest.fixture(scope="module", params=["w4a8"])
def packed(request, model, tmp_path_factory):
    """The tiny model, quantised by the command."""
    folder = tmp_path_factory.mktemp("packed") / request.param
    text = folder.parent / "text.txt"
    text.write_text("the sky is up and the sea is down. " * 40)
    how = ("--method", "rtn", "--scheme", request.param, "--held-out", text, "--window", 64, "--held-out-tokens", 128, "--limit", 100)
    assert ernie("quantize", model, "--out", folder, *how) == 0
    return folder


def tensors(folder):
    with open_safetensors(folder) as files:
        return {name: files.read(name).clone() for name in files}


def test_a_lesson_beside_packed_matrices_and_both_merges(packed, rows, tmp_path):
    out = tmp_path / "run"
    assert ernie("sft", packed, "--data", rows, "--out", out, "--lora.rank", 4, *COMMON) == 0
    seen = losses(out)
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    loaded = load(out / "model")
    assert loaded.opened.spec == load(packed).opened.spec
    assert isinstance(loaded.decoder.layers[0].attn.qkv.weight, PackedWeight)
    exact = load_model(packed, dtype="float32")
    unpack_model(exact, torch.float32)
    load_adapter(exact, out / "adapter")
    merge(exact)
    learned = exact.prompt_logits(IDS)
    assert ernie("export", packed, "--format", "folder", "--type", "f32", "--adapter", out / "adapter", "--out", tmp_path / "whole") == 0
    assert torch.equal(load_model(tmp_path / "whole").prompt_logits(IDS), learned)
    how = ("--format", "folder", "--type", "packed", "--adapter", out / "adapter")
    assert ernie("export", packed, *how, "--out", tmp_path / "again") == 0
    run, again = tensors(out / "model"), tensors(tmp_path / "again")
    assert set(run) == set(again) == set(tensors(packed))
    assert all(torch.equal(run[name], again[name]) for name in run)
    # what the merge into 4 or 8 bits loses is less than what was learned
    brought = (learned - load_model(packed).prompt_logits(IDS)).abs().mean()
    assert (loaded.decoder.prompt_logits(IDS) - learned).abs().mean() < 0.8 * brought
    assert json.loads((out / "model" / "config.json").read_text())["quantization_config"]["made_by"].startswith("adapters merged")


def test_preferences_beside_packed_matrices(packed, pairs, tmp_path):
    ernie("align", packed, "--data", pairs, "--out", tmp_path / "run", "--lora.rank", 4, *COMMON)
    seen = losses(tmp_path / "run")
    # the reference is the same packed model, computed in the same floats
    assert seen[0] == pytest.approx(0.6931, abs=1e-3)
    assert seen[-1] < 0.5


def test_what_cannot_be_is_refused(packed, model, rows, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"packed weights do not learn; train adapters"):
        ernie("sft", packed, "--data", rows, "--out", tmp_path / "run", "--lora.rank", 0)
    with pytest.raises(ConfigError, match="packed weights do not learn; take the original"):
        ernie("pretrain", packed, "--data", tmp_path, "--out", tmp_path / "run2")
    with pytest.raises(CheckpointError, match="is not quantised; take --type bf16"):
        ernie("export", model, "--format", "folder", "--type", "packed", "--out", out)
    for words in (("--adapter", tmp_path), ("--type", "packed")):
        with pytest.raises(ConfigError, match="need --format folder"):
            ernie("export", model, "--out", out, *words)
    with pytest.raises(ConfigError, match="q8_0 is a type of GGUF"):
        ernie("export", model, "--format", "folder", "--type", "q8_0", "--out", out)
    with pytest.raises(CheckpointError, match="is this a PEFT adapter folder"):
        ernie("export", model, "--format", "folder", "--type", "bf16", "--adapter", rows.parent, "--out", out)
    assert not out.exists()
