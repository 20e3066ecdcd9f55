"""Folders in the format of compressed-tensors, read by its own package through transformers, and by ourselves."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.by_layer import LayeredModel
from ernie45.models.compressed_export import export_compressed
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.load import load_model, open_model
from ernie45.models.packed import packed_entry
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.quant.convert import Plan, convert, leave_only_model
from ernie45.quant.frozen import unpack_model
from ernie45.quant.methods import METHODS
from ernie45.quant.spec import QuantSpec, Rule
from ernie45.recipes.export import ExportConfig, run
from ernie45.weights import safetensors_write
from ernie45.weights.compressed import words
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

DENSE = TextConfig(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4, head_size=32, ffn_size=256, vocab_size=160)
EXPERTS = replace(
    DENSE, tie_embeddings=False, experts=ExpertsConfig(num_experts=4, top_k=2, expert_size=64, num_shared=1, first_layer=1, last_layer=1)
)
IDS = list(range(5, 40))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder_of(config, path):
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.1), path)
    return path


def export(path, word, out):
    opened = open_model(path)
    with opened.files:
        return export_compressed(opened, word, out)


def logits(path):
    return load_model(path, dtype="float32").prompt_logits(IDS)


def packed_folder(config, place, spec):
    """A folder of our own, as `ernie quantize` writes it."""
    source = LayeredModel(open_model(folder_of(config, place / "float")))
    text = torch.randint(0, 160, (3, 24), generator=torch.Generator().manual_seed(1))
    convert(source, Plan(spec=spec, method=METHODS["gptq"], calibration_SL=text, held_out_SL=text, least_expert_tokens=4, fingerprint="a"),
            place / "packed", lambda *_: None)  # fmt: skip
    leave_only_model(place / "packed")
    (place / "packed" / "config.json").write_text(json.dumps(config.to_hf() | {"quantization_config": packed_entry(spec, "gptq")}))
    return place / "packed"


@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_words_are_those_of_the_package(rows, columns, bits, seed):
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    whole = torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(words(whole, bits), pack_to_int32(whole, bits))


@pytest.mark.parametrize(
    ("word", "form", "lost"),
    [
        ("w4a16-g64", "pack-quantized", 0.5),
        ("w8a16", "pack-quantized", 0.05),
        ("w8a8", "int-quantized", 0.05),
        ("fp8-block", "float-quantized", 0.2),
        ("fp8-channel", "float-quantized", 0.2),
        ("fp8-tensor", "float-quantized", 0.2),
    ],
)
def test_transformers_reads_the_numbers_that_we_read(tmp_path, word, form, lost):
    result = export(folder_of(DENSE, tmp_path / "float"), word, tmp_path / "out")
    assert result.formats == {form: 14}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        their_logits = theirs(torch.tensor([IDS])).logits[0]  # matrices are decoded on the first call
    ours = load_model(tmp_path / "out", dtype="float32")
    for layer, block in zip(theirs.model.layers, ours.layers, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        want = {
            "attn.qkv": torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]),
            "attn.out": attn.o_proj.weight,
            "ffn.gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "ffn.down": mlp.down_proj.weight,
        }
        for name, matrix in want.items():  # the product of a number and its scale, rounded once on either side
            torch.testing.assert_close(block.get_submodule(name).weight, matrix, rtol=1e-6, atol=0)
    if form == "pack-quantized":  # elsewhere transformers rounds activations as well, as such folders ask it to
        torch.testing.assert_close(logits(tmp_path / "out"), their_logits, rtol=1e-4, atol=1e-4)
    original = logits(tmp_path / "float")
    assert 0 < (logits(tmp_path / "out") - original).norm() / original.norm() < lost


@pytest.mark.parametrize("word", ["w4a16-g128", "w8a16", "w8a8", "fp8-block", "fp8-channel", "fp8-tensor"])
def test_the_settings_are_what_the_package_understands(tmp_path, word):
    export(folder_of(DENSE, tmp_path / "float"), word, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(entry).model_dump()["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        written = entry["config_groups"]["group_0"][part]
        assert (group[part] is None) == (written is None)
        assert written is None or {key: group[part][key] for key in written} == written
    assert "lm_head" in entry["ignore"]


def test_a_packed_folder_keeps_its_numbers(tmp_path):
    spec = QuantSpec(
        rules=(Rule(pattern="embed", scheme=None), Rule(pattern="*.down", scheme="w8a16"), Rule(pattern="*", scheme="w4a16-g64"))
    )
    source = packed_folder(DENSE, tmp_path, spec)
    result = export(source, None, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(entry)
    assert result.formats == {"pack-quantized": 14}
    groups = {group["weights"]["num_bits"]: group["targets"] for group in entry["config_groups"].values()}
    assert groups[8] == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert len(groups[4]) == 12
    ours, back = load_model(source, dtype="float32"), load_model(tmp_path / "out", dtype="float32")
    got, want = back.prompt_logits(IDS), ours.prompt_logits(IDS)
    # matrices are the same to the bit; the embedding became bfloat16
    assert (got - want).norm() / want.norm() < 6e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("word", ["fp8-channel", "fp8-tensor-static", "fp8-channel-static"])
def test_fp8_folders_of_our_own_keep_numbers_and_static_scales(tmp_path, config, word):
    end = Rule(pattern="embed" if config.tie_embeddings else "head", scheme=None)
    source = packed_folder(config, tmp_path, QuantSpec(rules=(end, Rule(pattern="*", scheme=word))))
    export(source, None, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(entry)
    ours = load_model(source, dtype="float32")
    with open_safetensors(tmp_path / "out") as files:
        up = "model.layers.0.mlp.up_proj"
        whole = ours.layers[0].ffn.gate_up.weight
        assert torch.equal(files.read(f"{up}.weight").view(torch.uint8), whole.matrix.values[-256:].view(torch.uint8))
        assert (f"{up}.input_scale" in set(files)) == word.endswith("static")
        if word.endswith("static"):
            assert torch.equal(files.read(f"{up}.input_scale"), whole.input_scale)
    unpack_model(ours, torch.float32)
    back = load_model(tmp_path / "out", dtype="float32").state_dict()
    for name, tensor in ours.state_dict().items():
        assert not name.startswith("layers.") or torch.equal(tensor, back[name]), name


def test_experts_are_cut_apart_and_routers_left_whole(tmp_path):
    source = packed_folder(EXPERTS, tmp_path, QuantSpec(rules=(Rule(pattern="head", scheme="w8a8"), Rule(pattern="*", scheme="w4a8-g64"))))
    result = export(source, None, tmp_path / "out")
    assert "float activations" in result.notes[0]
    with open_safetensors(tmp_path / "out") as files:
        names = set(files)
        assert files.info("model.layers.1.mlp.gate.weight").dtype == torch.float32
    assert {f"model.layers.1.mlp.experts.{e}.{part}_proj.weight_packed" for e in range(4) for part in ("gate", "up", "down")} <= names
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["ignore"] == ["lm_head", "model.layers.1.mlp.gate"]
    original, got = logits(tmp_path / "float"), logits(tmp_path / "out")
    packed = load_model(source, dtype="float32").prompt_logits(IDS)
    # the same 4-bit matrices, without 8-bit activations and head: nearer to the original, and near the packed model
    assert (got - packed).norm() / packed.norm() < 0.1 * (got - original).norm() / original.norm() + 0.05


@pytest.mark.parametrize(
    ("config", "word", "kind", "text"),
    [
        (DENSE, None, ConfigError, "say how its matrices"),
        (DENSE, "w4a16-g64-h", ConfigError, "no-hadamard"),
        (DENSE, "fp8-tensor-static", ConfigError, "take fp8-tensor, or export"),
        (DENSE, "fp9", ConfigError, "not a quantisation scheme"),
        (replace(DENSE, ffn_size=96), "w4a16-g64", CheckpointError, r"down_proj.*96 wide, not a multiple of the group 64"),
        (replace(DENSE, ffn_size=192), "fp8-block", CheckpointError, "take fp8-channel"),
    ],
)
def test_what_the_format_cannot_say(tmp_path, config, word, kind, text):
    folder_of(config, tmp_path / "float")
    with pytest.raises(kind, match=text):
        export(tmp_path / "float", word, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder_of(DENSE, tmp_path / "float")
    monkeypatch.setattr(safetensors_write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        export(tmp_path / "float", "w4a16-g64", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_weights_that_are_no_numbers(tmp_path):
    folder_of(DENSE, tmp_path / "float")
    with open_safetensors(tmp_path / "float") as files:
        tensors = {name: files.read(name).clone() for name in files}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    for path in (tmp_path / "float").glob("model*"):
        path.unlink()
    save_safetensors(tmp_path / "float", tensors.items())
    with pytest.raises(CheckpointError, match="up_proj"):
        export(tmp_path / "float", "fp8-channel", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    folder_of(DENSE, tmp_path / "float")
    config = {"model": str(tmp_path / "float"), "out": tmp_path / "out", "format": "compressed-tensors"}
    assert run(ExportConfig(**config, scheme="w8a8-g64"), Environment.read()) == 0
    said = capsys.readouterr().out
    assert "14 pack-quantized" in said
    assert "w8a8-g64: written with float activations" in said
    with pytest.raises(CheckpointError, match="not an empty folder"):
        run(ExportConfig(**config, scheme="w8a8"), Environment.read())
    for wrong in ({"type": "q4_0"}, {"adapter": tmp_path}):
        with pytest.raises(ConfigError, match="neither"):
            ExportConfig(**config, **wrong)
    with pytest.raises(ConfigError, match="--scheme is for"):
        ExportConfig(model="starter", out=tmp_path / "x", scheme="w8a8")
