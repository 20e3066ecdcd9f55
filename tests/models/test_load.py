"""Loading: decisions said aloud, damage answered, nothing silently dropped."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45 import ops
from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.compute import choose_compute, cpu_has_bfloat16
from ernie45.models.gguf_config import config_to_gguf
from ernie45.models.load import find_model, load, load_model, open_model
from ernie45.models.names import name_table
from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.weights.gguf_blocks import BLOCK_TYPES
from ernie45.weights.gguf_write import GgufSpec, write_gguf
from ernie45.weights.stream import save_piece

TOKENS = [1, 5, 300, 7]
BIAS = "model.layers.2.mlp.moe_statics.e_score_correction_bias"


def decoder_of(config, dtype=torch.float32):
    decoder = Decoder(config).to(dtype).initialise(torch.Generator().manual_seed(1))
    for name, parameter in decoder.named_parameters():
        if "router" in name:
            parameter.data = parameter.data.float().normal_(0, 0.3)
    return decoder


@pytest.fixture
def folder(tmp_path):
    """A saved model with experts and an MTP block."""
    save_model(decoder_of(tiny(experts=True, num_mtp=1)), tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def refusal(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    assert str(folder) in str(caught.value) or "tensor '" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["pt", "fused", "paddle"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, layout):
    decoder = decoder_of(tiny(experts=True, num_mtp=1), torch.bfloat16)
    save_model(decoder, tmp_path / "m", layout=layout, shard_bytes=100_000)
    loaded = load(tmp_path / "m", dtype="bfloat16")
    assert loaded.decoder.config == decoder.config
    assert loaded.opened.layout == layout
    ours, theirs = loaded.decoder.state_dict(), decoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["layers.1.ffn.router.weight"].dtype == torch.float32
    assert not loaded.decoder.training


def test_paddle_bits_in_uint16_are_bfloat16(tmp_path):
    decoder = decoder_of(tiny(), torch.bfloat16)
    save_model(decoder, tmp_path / "m", layout="paddle")
    edit_weights(tmp_path / "m", lambda tensors: tensors.update({name: t.view(torch.uint16) for name, t in tensors.items()}))
    loaded = load(tmp_path / "m", dtype="bfloat16")
    assert loaded.opened.stored == torch.bfloat16
    assert torch.equal(loaded.decoder.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS))


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_routers_and_mtp_projections_uploaded_the_other_way_round(tmp_path, layout):
    decoder = decoder_of(tiny(experts=True, num_mtp=1))
    save_model(decoder, tmp_path / "m", layout=layout)

    def turn(tensors):
        for name in tensors:
            if name.endswith((".mlp.gate.weight", ".mtp_linear_proj.0.weight")):
                tensors[name] = tensors[name].T.contiguous()

    edit_weights(tmp_path / "m", turn)
    back = load(tmp_path / "m").decoder.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in decoder.state_dict().items())


def test_an_unfused_tensor_stays_in_the_file_and_learns_apart_from_it(folder):
    before = (folder / "model.safetensors").read_bytes()
    decoder = load_model(folder, dtype="float32", mapped=True)
    decoder.embed.weight.data.zero_()
    decoder.layers[0].attn.qkv.weight.data.zero_()
    assert decoder.embed.weight.requires_grad
    assert not decoder.layers[1].ffn.router.selection_bias.requires_grad
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("experts", [False, True])
def test_a_gguf_file_is_loaded(tmp_path, experts):
    decoder = decoder_of(tiny(experts=experts))
    weights = decoder.state_dict()
    pieces = {p.file: p for p in name_table(decoder.config, "gguf").save_plan({name: tuple(t.shape) for name, t in weights.items()})}
    specs = [GgufSpec(piece.file, BLOCK_TYPES[0], piece.shape) for piece in pieces.values()]
    path = tmp_path / "m.gguf"
    write_gguf(path, config_to_gguf(decoder.config), specs, lambda n: save_piece(pieces[n], weights[pieces[n].ours], torch.float32))
    loaded = load(path)
    assert (loaded.opened.layout, loaded.compute.dtype) == ("gguf", torch.float32)
    assert torch.equal(loaded.decoder.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS))
    half = load(path, dtype="bfloat16").decoder.state_dict()
    assert all(torch.equal(half[name], tensor if ".router." in name else tensor.bfloat16()) for name, tensor in weights.items())


def test_a_missing_selection_bias_is_no_detail(folder):
    edit_weights(folder, lambda tensors: tensors.pop(BIAS))
    said = refusal(folder)
    assert BIAS in said
    assert "which experts are chosen" in said


def test_every_difference_is_listed(folder):
    def change(tensors):
        for layer in (1, 2, 3):
            tensors.pop(f"model.layers.{layer}.mlp.gate.weight")
        tensors["model.layers.9.input_layernorm.weight"] = torch.ones(64)
        tensors["model.norm.weight"] = torch.ones(63)

    edit_weights(folder, change)
    said = refusal(folder)
    assert "model.layers.{1..3}.mlp.gate.weight (3)" in said
    assert "model.layers.9.input_layernorm.weight" in said
    assert "model.norm.weight: [63] found, [64] needed" in said


def test_a_quantised_checkpoint_is_recognised(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}))
    assert "quantised checkpoint" in refusal(folder)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_bad_numbers_are_named(folder, value):
    edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(-1)[5:6].fill_(float(value)))
    assert "'model.layers.1.mlp.experts.3.up_proj.weight' has 1 of" in refusal(folder)
    assert load(folder, check=False).decoder is not None


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated; download or copy it again" in refusal(folder)


def test_mtp_is_built_left_out_or_given_up_aloud(folder):
    assert load(folder).decoder.mtp is not None
    assert load(folder).opened.notes == ()
    without = load(folder, mtp=False)
    assert without.decoder.mtp is None
    assert "left in the file" in without.opened.notes[0]
    edit_config(folder, num_nextn_predict_layers=...)
    found = load(folder)
    assert found.decoder.mtp is not None
    assert "does not mention" in found.opened.notes[0]
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mtp_" in name])
    edit_config(folder, num_nextn_predict_layers=1)
    lost = load(folder)
    assert lost.decoder.mtp is None
    assert "announces" in lost.opened.notes[0]


def test_half_an_mtp_block_is_an_error(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.mtp_linear_proj.0.weight"))
    assert "model.mtp_linear_proj.0.weight" in refusal(folder)


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_stored_head_of_a_tied_model(tmp_path, layout):
    decoder = decoder_of(replace(tiny(), tie_embeddings=False))
    decoder.head.weight.data.copy_(decoder.embed.weight.data)
    save_model(decoder, tmp_path / "m", layout=layout)
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    loaded = load(tmp_path / "m")
    assert loaded.decoder.head is None
    assert "repeats the embedding" in loaded.opened.notes[0]
    edit_weights(tmp_path / "m", lambda tensors: tensors["lm_head.weight"].view(-1)[7:8].add_(1))
    assert "set tie_word_embeddings to false" in refusal(tmp_path / "m")
    edit_config(tmp_path / "m", tie_word_embeddings=...)
    untied = load(tmp_path / "m")
    assert untied.decoder.head is not None
    assert "does not say" in untied.opened.notes[0]


def test_files_that_are_no_model_of_ours(folder, tmp_path):
    edit_config(folder, model_type="llama")
    assert "'llama' is not of the ERNIE 4.5 family; supported: ernie4_5, ernie4_5_moe" in refusal(folder)
    for text, word in (("{", "is not JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "not JSON")):
        (folder / "config.json").write_text(text)
        assert word in refusal(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("num_hidden_layers", 10**12, "1,000,000,000,000 layers and the files have"),
        ("vocab_size", 10**30, "vocabulary is too large"),
        ("head_dim", 10**20, "query width is too large"),
        ("moe_num_experts", 10**9, "number of experts is too large"),
        ("moe_num_shared_experts", 10**9, "shared width is too large"),
    ],
)
def test_a_hostile_config_costs_nothing(folder, key, value, word):
    edit_config(folder, **{key: value})
    assert word in refusal(folder)


def test_opening_reads_no_data(folder):
    edit_weights(folder, lambda tensors: tensors[BIAS].fill_(float("nan")))
    opened = open_model(folder)
    assert opened.plan.complete
    assert opened.complaint() == ""
    assert opened.config.num_mtp == 1


@pytest.mark.parametrize(
    ("asked", "stored", "fast", "chosen"),
    [
        ("auto", torch.bfloat16, True, "bfloat16"),
        ("auto", torch.bfloat16, False, "float32"),
        ("auto", torch.float16, True, "float32"),
        ("auto", torch.float32, True, "float32"),
        ("float32", torch.bfloat16, True, "float32"),
        ("bfloat16", torch.float32, False, "bfloat16"),
    ],
)
def test_the_compute_type_is_chosen_with_a_reason(asked, stored, fast, chosen):
    compute = choose_compute(asked, stored, fast_bfloat16=fast)
    assert compute.name == chosen
    assert str(compute).startswith(f"{chosen} (")
    assert "stored" in compute.reason


@pytest.mark.parametrize(
    ("asked", "fast", "chosen"), [("auto", True, "bfloat16"), ("auto", False, "float32"), ("float32", True, "float32")]
)
def test_matrices_that_round_what_they_read_compute_in_bfloat16(asked, fast, chosen):
    assert choose_compute(asked, torch.float32, fast_bfloat16=fast, coarse=True).name == chosen


def test_compute_types_that_do_not_exist():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        choose_compute("bfloat", torch.float32, fast_bfloat16=True)
    with pytest.raises(ConfigError, match="int8"):
        choose_compute("int8", torch.float32, fast_bfloat16=True)
    assert cpu_has_bfloat16() in (True, False)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("ERNIE-4.5-VL-28B-A3B-PT", "is not in the cache"),
        ("baidu/ERNIE-4.5-300B-A47B-FP8-Paddle", "stored as fp8"),
        ("0.3B", "baidu/ERNIE-4.5-0.3B-PT is not in the cache"),
        ("21B-A3B-Thinking", "baidu/ERNIE-4.5-21B-A3B-Thinking is not in the cache"),
        ("300b-a47b-paddle", "did you mean|lists the names"),
        ("startr", "did you mean 'starter'"),
    ],
)
def test_names_of_the_family(tmp_path, name, word):
    with pytest.raises(CheckpointError, match=word):
        find_model(name, Environment(cache_dir=tmp_path, hf_home=tmp_path, offline=True))


@pytest.mark.native
@pytest.mark.usefixtures("kernels")
def test_compact_holds_what_is_stored_as_bfloat16_and_nothing_else(tmp_path, monkeypatch):
    save_model(decoder_of(tiny(experts=True, num_mtp=1), torch.bfloat16), tmp_path / "half")
    save_model(decoder_of(tiny(experts=True)), tmp_path / "full")
    half, real = load(tmp_path / "half", dtype="float32", compact=True), load(tmp_path / "half", dtype="float32")
    held = {name: value.dtype for name, value in half.decoder.state_dict().items()}
    assert {held[name] for name in ("embed.weight", "mtp.project.weight", "layers.2.ffn.experts.down")} == {torch.bfloat16}
    assert {held[name] for name in ("norm.weight", "layers.2.ffn.router.weight")} == {torch.float32}
    assert half.decoder.dtype == half.decoder.embed(torch.tensor([1])).dtype == torch.float32
    assert {value.dtype for value in real.decoder.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(half.decoder.prompt_logits(TOKENS), real.decoder.prompt_logits(TOKENS), atol=1e-5, rtol=1e-5)
    for loaded in (load(tmp_path / "full", dtype="float32", compact=True), load(tmp_path / "half", dtype="bfloat16", compact=True)):
        assert "as they are stored" not in str(loaded.compute)
        assert loaded.decoder.head_matrix.dtype == loaded.compute.dtype
    monkeypatch.setattr(ops, "KERNELS", None)
    assert load(tmp_path / "half", dtype="float32", compact=True).decoder.head_matrix.dtype == torch.float32
