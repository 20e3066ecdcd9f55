"""Models of FP8 numbers: quantised, written, read back, run beside transformers, and refused where damaged."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.by_layer import LayeredModel
from ernie45.models.compressed_export import export_compressed
from ernie45.models.config import TextConfig
from ernie45.models.load import load_model, open_model
from ernie45.models.on_the_fly import load_quantised
from ernie45.models.packed import packed_entry
from ernie45.models.save import save_model
from ernie45.models.sizes import weight_bytes
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig
from ernie45.ops.fp8 import from_fp8
from ernie45.quant.convert import Plan, convert, leave_only_model
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear
from ernie45.quant.frozen import unpack_model
from ernie45.quant.methods import METHODS
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import Fp8Scheme, QuantSpec, Rule, parse_scheme
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

WORDS = ["fp8-block", "fp8-channel", "fp8-tensor", "fp8-block-static", "fp8-tensor-static"]
IDS = list(range(5, 40))


def text(seed, sequences=3, length=24):
    return torch.randint(0, 160, (sequences, length), generator=torch.Generator().manual_seed(seed))


def spec_of(word):
    return QuantSpec(rules=(Rule(pattern="embed", scheme=None), Rule(pattern="*", scheme=word)))


def converted(decoder, place, word, method="gptq"):
    """(what was measured, the finished folder)"""
    save_model(decoder, place / "float")
    plan = Plan(
        spec=spec_of(word), method=METHODS[method], calibration_SL=text(1), held_out_SL=text(2), least_expert_tokens=4, fingerprint="a"
    )
    result = convert(LayeredModel(open_model(place / "float")), plan, place / "packed", lambda *_: None)
    leave_only_model(place / "packed")
    (place / "packed" / "config.json").write_text(
        json.dumps(decoder.config.to_hf() | {"quantization_config": packed_entry(plan.spec, method)})
    )
    return result, place / "packed"


@pytest.mark.parametrize("word", [*WORDS, "fp8-channel-static", "fp8-tensor-static-h"])
def test_words_are_written_as_they_are_read(word):
    assert str(parse_scheme(word)) == word


@pytest.mark.parametrize("word", ["fp8", "fp8-row", "fp8-h-block", "fp8-static"])
def test_other_words_are_refused(word):
    with pytest.raises(ConfigError, match="fp8-block, fp8-channel or fp8-tensor"):
        parse_scheme(word)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("experts", [False, True])
def test_the_loaded_folder_is_what_was_measured(tiny, tmp_path, word, experts):
    decoder = tiny(experts=experts)
    result, folder = converted(decoder, tmp_path, word)
    loaded = load_model(folder, dtype="float32")
    assert isinstance(loaded.layers[0].ffn.down, Fp8Linear)
    assert isinstance(getattr(loaded.layers[1].ffn, "experts", None), Fp8Experts) == experts
    rows = torch.cat([loaded.prompt_logits(row.tolist())[:-1].log_softmax(-1) for row in text(2)])
    loss = float(-rows.gather(1, torch.cat([row[1:] for row in text(2)])[:, None]).double().mean())
    assert result.quality.perplexity_after == pytest.approx(2.718281828459045**loss, rel=1e-4)
    assert 0 < result.quality.divergence < 0.1
    stored = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert stored == weight_bytes(ModelConfig(decoder.config, None), spec_of(word), float_bytes=4)


@pytest.mark.parametrize("word", ["fp8-block", "fp8-channel"])
def test_every_matrix_computes_what_it_does_in_transformers(tmp_path, word):
    """In the format of compressed-tensors transformers rounds activations to E4M3 as well: matrix by matrix, on its own inputs."""
    config = TextConfig(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4, head_size=32, ffn_size=256, vocab_size=160)
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.1), tmp_path / "float")
    opened = open_model(tmp_path / "float")
    with opened.files:
        export_compressed(opened, word, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = load_quantised(tmp_path / "float", word, dtype="float32", environment=Environment.read()).decoder
    passed = {}

    def keep(name):
        return lambda module, inputs, output: passed.update({name: (inputs[0][0], output[0])})

    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        theirs(torch.tensor([IDS]))
        for layer, block in enumerate(ours.layers):
            for joined, names in (
                (block.attn.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                (block.attn.out, ("self_attn.o_proj",)),
                (block.ffn.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
                (block.ffn.down, ("mlp.down_proj",)),
            ):
                known = [passed[f"model.layers.{layer}.{name}"] for name in names]
                want = torch.cat([output for _, output in known], dim=1)
                torch.testing.assert_close(joined(known[0][0]), want, rtol=1e-5, atol=1e-5)


def test_static_scales_are_the_largest_that_was_seen(tiny, tmp_path):
    decoder = tiny()
    _, folder = converted(decoder, tmp_path, "fp8-tensor-static")
    module = load_model(folder, dtype="float32").layers[0].attn.qkv
    hidden = torch.stack([decoder.layers[0].attn_norm(decoder.embed(row)) for row in text(1)])
    torch.testing.assert_close(module.input_fp8_scale, hidden.abs().max().view(1) / 448, rtol=1e-5, atol=0)
    assert module.weight.matrix.scales.shape == (1, 1)


def test_floats_again(tiny):
    decoder = tiny(experts=True)
    quantise_model(decoder, spec_of("fp8-channel"))
    matrix = from_fp8(decoder.layers[0].attn.out.weight.matrix)
    before = decoder.prompt_logits(IDS)
    unpack_model(decoder, torch.float32)
    assert torch.equal(decoder.layers[0].attn.out.weight, matrix)
    after = decoder.prompt_logits(IDS)
    assert 0 < (after - before).norm() / before.norm() < 0.2  # activations are whole now


def rewrite(folder, change):
    with open_safetensors(folder) as files:
        tensors = {name: files.read(name).clone() for name in files}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_safetensors(folder, tensors.items())


NAME = "layers.1.ffn.down.weight_fp8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[NAME].view(torch.uint8)[3, 4].fill_(0x7F), "NaN"),
        (lambda t: t[NAME].view(torch.uint8)[3, 4].fill_(0xFF), "NaN"),
        (lambda t: t[NAME + "_scale"][0].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e5m2)}), "float8_e5m2"),
        (lambda t: t.update({NAME: t[NAME].float()}), "float32"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), "wrong shape"),
        (lambda t: t.pop(NAME + "_scale"), "missing"),
    ],
)
def test_damaged_folders_are_refused_by_name(tiny, tmp_path, change, said):
    _, folder = converted(tiny(), tmp_path, "fp8-block", "rtn")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"(?s)(layers\.1\.ffn\.down.*{said}|{said}.*layers\.1\.ffn\.down)"):
        load_model(folder)


def test_what_makes_no_sense_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="no calibration text"):
        quantise_model(tiny(), spec_of("fp8-tensor-static"))
    with pytest.raises(ConfigError, match="an embedding is not stored as fp8-block"):
        quantise_model(tiny(), QuantSpec.uniform("fp8-block"))
    with pytest.raises(ConfigError, match="no calibration text"):
        converted(tiny(), tmp_path, "fp8-tensor-static", "rtn")
    damaged = tiny()
    damaged.layers[0].ffn.down.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="NaN or infinities"):
        quantise_model(damaged, spec_of("fp8-channel"))


def test_bits_are_counted():
    assert Fp8Scheme("channel").bits_per_weight(1024) == 8 + 32 / 1024
    assert Fp8Scheme("block").scales(200, 130) == (2, 2)
