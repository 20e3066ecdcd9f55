"""Export to GGUF from every kind of source. That llama.cpp runs the result is tested in e2e."""

import json
from dataclasses import replace

import pytest
import torch

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.gguf_export import export_gguf
from ernie45.models.load import load_model, open_model
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.export import ExportConfig, run
from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf
from ernie45.tokens.vocabulary import byte_level_table
from ernie45.weights.gguf import open_gguf

DENSE = TextConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=48, vocab_size=264, max_positions=64, num_mtp=1
)
EXPERTS = replace(
    DENSE, num_layers=3, experts=ExpertsConfig(num_experts=4, top_k=2, expert_size=24, num_shared=1, first_layer=1, last_layer=2)
)
UNTIED = replace(EXPERTS, tie_embeddings=False, num_mtp=0)
IDS = [5, 9, 200, 31, 7]


def folder_of(config, path, layout="pt", dtype=torch.float32):
    """A random model folder with a byte-level tokenizer."""
    decoder = Decoder(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    save_model(decoder, path, layout=layout)
    tokens = ["<pad>", "<s>", "</s>", *byte_level_table()]
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3] * 3 + [1] * 256, "merges": [], "eos_token_id": 2}
    contents = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), contents, strict=True):
        (path / name).write_text(json.dumps(content))
    return decoder


def export(path, out, kind="f32", progress=None):
    opened = open_model(path)
    with opened.files:
        return export_gguf(opened, kind, out, progress=progress)


@pytest.mark.parametrize("config", [DENSE, EXPERTS, UNTIED], ids=["dense", "experts", "untied"])
def test_a_float32_file_is_the_model_without_its_mtp_block(config, tmp_path):
    decoder = folder_of(config, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out.gguf")
    back = load_model(tmp_path / "out.gguf", dtype="float32")
    kept = {name: tensor for name, tensor in decoder.state_dict().items() if not name.startswith("mtp.")}
    assert back.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in back.state_dict().items())
    assert replace(back.config, rope_theta=0.1, norm_eps=0.1) == replace(config, num_mtp=0, rope_theta=0.1, norm_eps=0.1)
    assert torch.equal(back.prompt_logits(IDS), decoder.prompt_logits(IDS))


@pytest.mark.parametrize("layout", ["paddle", "fused"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_source_layout_leaves_no_trace(layout, kind, tmp_path):
    for name in ("pt", layout):
        folder_of(EXPERTS, tmp_path / name / "model", layout=name, dtype=torch.bfloat16)
        export(tmp_path / name / "model", tmp_path / f"{name}.gguf", kind)
    assert (tmp_path / "pt.gguf").read_bytes() == (tmp_path / f"{layout}.gguf").read_bytes()


def test_a_gguf_file_is_a_source_too_and_keeps_its_tokenizer(tmp_path):
    folder_of(EXPERTS, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "first.gguf", "q8_0")
    export(tmp_path / "first.gguf", tmp_path / "second.gguf", "f32")
    first, second = (open_gguf(tmp_path / f"{name}.gguf") for name in ("first", "second"))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first)
    assert {k: v for k, v in first.metadata.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in second.metadata.items() if k.startswith("tokenizer.")
    }


def test_each_tensor_has_the_format_llama_cpp_wants(tmp_path):
    folder_of(EXPERTS, tmp_path / "model")
    seen = []
    result = export(tmp_path / "model", tmp_path / "out.gguf", "q4_0", progress=lambda name, done, total: seen.append((name, done, total)))
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.type_of("token_embd.weight") == "Q8_0"
        assert file.type_of("blk.0.attn_q.weight") == "Q4_0"
        assert file.type_of("blk.0.ffn_down.weight") == "F16", "rows of 48 are no multiple of 32"
        for name in ("blk.0.attn_norm", "blk.1.ffn_gate_inp", "output_norm"):
            assert file.type_of(f"{name}.weight") == "F32"
        assert file.type_of("blk.1.exp_probs_b.bias") == "F32"
        assert file.metadata["general.file_type"] == 2
        assert file.metadata["ernie4_5-moe.expert_shared_feed_forward_length"] == 24
        assert [name for name, _, _ in seen] == file.names()
        assert sum(result.formats.values()) == len(file)
    assert seen[-1][1] == seen[-1][2] == len(seen)
    assert result.size == (tmp_path / "out.gguf").stat().st_size


def test_one_parameter_is_held_at_a_time(tmp_path, monkeypatch):
    """Each parameter is asked for once, in order, although three files of q, k and v come out of one."""
    folder_of(DENSE, tmp_path / "model")
    from ernie45.models import gguf_export

    asked = []
    load = gguf_export.load_pieces
    monkeypatch.setattr(
        gguf_export, "load_pieces", lambda plan, files, wanted, dtype: asked.append(*wanted) or load(plan, files, wanted, dtype)
    )
    export(tmp_path / "model", tmp_path / "out.gguf")
    assert len(asked) == len(set(asked))
    assert sum(name.endswith("qkv.weight") for name in asked) == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(DENSE, use_bias=True), "biases"),
        (replace(EXPERTS, experts=replace(EXPERTS.experts, last_layer=1)), r"layers with experts are \[1\]"),
        (replace(EXPERTS, experts=replace(EXPERTS.experts, first_layer=0, interval=2)), r"layers with experts are \[1\]"),
    ],
    ids=["bias", "early end", "interval"],
)
def test_what_llama_cpp_cannot_express_is_refused(config, reason, tmp_path):
    folder_of(config, tmp_path / "model")
    with pytest.raises(CheckpointError, match=reason):
        export(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    folder_of(DENSE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        export(tmp_path / "model", tmp_path / "out.gguf")


def test_nan_weights_are_refused_and_leave_nothing(tmp_path):
    decoder = folder_of(DENSE, tmp_path / "model")
    with torch.no_grad():
        decoder.norm.weight[3] = float("nan")
    save_model(decoder, tmp_path / "bad", companions=tmp_path / "model")
    with pytest.raises(CheckpointError, match="NaN"):
        export(tmp_path / "bad", tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "model"]


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    folder_of(DENSE, tmp_path / "model")
    environment = Environment(cache_dir=tmp_path / "cache")
    out = tmp_path / "new" / "out.gguf"
    assert run(ExportConfig(model=str(tmp_path / "model"), out=out, type="q8_0"), environment) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="exists"):
        run(ExportConfig(model=str(tmp_path / "model"), out=out), environment)
    with pytest.raises(CheckpointError, match="is a folder"):
        run(ExportConfig(model=str(tmp_path / "model"), out=tmp_path), environment)
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        run(ExportConfig(model=str(tmp_path / "nowhere"), out=tmp_path / "x.gguf"), environment)
