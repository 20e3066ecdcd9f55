"""Folders that transformers writes run here with equal logits, and folders written here run there.

Tolerance 1e-4 absolute on logits of scale 1 to 10 in float32: the two sum in different orders, each layer adds about one rounding.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

from ernie45.models.load import load
from ernie45.models.save import save_model

TOLERANCE = 1e-4
TOKENS = [1, 5, 7, 99, 3, 42, 42, 100, 0, 17]
BASE = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
EXPERTS = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
DENSE_CASES = {
    "tied, heads wider than the model": {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 12},
    "untied, one key head": {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False},
    "biases, no grouping": {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 6, "use_bias": True},
}
EXPERT_CASES = {
    "one dense layer, shared experts, tied": {"num_hidden_layers": 3, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
    "three dense layers, none shared, untied": {
        "num_hidden_layers": 5,
        "moe_layer_start_index": 3,
        "moe_num_shared_experts": 0,
        "tie_word_embeddings": False,
    },
    "interval and end, other head size": {
        "num_hidden_layers": 6,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 4,
        "moe_layer_interval": 2,
        "moe_num_shared_experts": 1,
        "head_dim": 10,
    },
    "biases": {"num_hidden_layers": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1, "use_bias": True},
}
CASES = [*DENSE_CASES, *EXPERT_CASES]


def reference(case):
    """A random transformers model whose weights are large enough that every part moves the logits."""
    torch.manual_seed(CASES.index(case))
    if case in DENSE_CASES:
        model = Ernie4_5ForCausalLM(Ernie4_5Config(**BASE, **DENSE_CASES[case]))
    else:
        model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**BASE, **EXPERTS, **EXPERT_CASES[case]))
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "correction_bias" in name:
                parameter.normal_(0, 0.5)  # probabilities are about 1/8: this decides the choice
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    return model.eval()


def their_logits(model):
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float()


def assert_equal_logits(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.5, "logits this small would hide an error"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["original", "fused"])
def test_their_folder_runs_here(tmp_path, case, form):
    model = reference(case)
    model.save_pretrained(tmp_path, save_original_format=form == "original")
    loaded = load(tmp_path, dtype="float32")
    assert loaded.opened.layout == ("fused" if form == "fused" and case in EXPERT_CASES else "pt")
    assert_equal_logits(loaded.decoder.prompt_logits(TOKENS), their_logits(model))


@pytest.mark.native
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", CASES)
def test_matrices_held_as_bfloat16_give_their_float32_logits(tmp_path, case):
    """The published checkpoints are bfloat16: in float32 it is one network, whether weights are widened at load or when used."""
    model = reference(case).bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    kind = Ernie4_5ForCausalLM if case in DENSE_CASES else Ernie4_5_MoeForCausalLM
    theirs = kind.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    if case in EXPERT_CASES:
        theirs.set_experts_implementation("eager")
    loaded = load(tmp_path / "theirs", dtype="float32", compact=True)
    wide = {name for name, value in loaded.decoder.state_dict().items() if value.dtype == torch.float32}
    assert all(re.search(r"norm\.weight$|bias$|\.router\.", name) for name in wide)
    assert "as they are stored" in str(loaded.compute)
    assert_equal_logits(loaded.decoder.prompt_logits(TOKENS), their_logits(theirs.eval()))
    save_model(loaded.decoder, tmp_path / "ours")
    again = load(tmp_path / "ours", dtype="float32")
    assert again.decoder.head_matrix.dtype == torch.float32
    assert_equal_logits(again.decoder.prompt_logits(TOKENS), their_logits(theirs))


@pytest.mark.parametrize("case", CASES)
def test_our_folder_runs_there(tmp_path, case):
    model = reference(case)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    decoder = load(tmp_path / "theirs", dtype="float32").decoder
    save_model(decoder, tmp_path / "ours", shard_bytes=30_000)
    kind = Ernie4_5ForCausalLM if case in DENSE_CASES else Ernie4_5_MoeForCausalLM
    back, info = kind.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    if case in EXPERT_CASES:
        back.set_experts_implementation("eager")
    assert_equal_logits(decoder.prompt_logits(TOKENS), their_logits(back.eval()))


@pytest.mark.parametrize("case", CASES)
def test_the_paddle_layout_keeps_every_logit(tmp_path, case):
    reference(case).save_pretrained(tmp_path / "theirs")
    decoder = load(tmp_path / "theirs", dtype="float32").decoder
    save_model(decoder, tmp_path / "paddle", layout="paddle")
    back = load(tmp_path / "paddle", dtype="float32")
    assert back.opened.layout == "paddle"
    assert torch.equal(back.decoder.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS))


def as_paddle(pt):
    """A PT state in the published Paddle form, written out plainly: Linears [in, out], columns q|k|v and gate|up, prefix `ernie`."""
    joins = {
        "self_attn.q_proj": ("self_attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        "gate_proj": ("up_gate_proj", ["gate_proj", "up_proj"]),
    }
    result = {}
    for name, tensor in pt.items():
        target = re.sub(r"^model\.", "ernie.", name)
        first = next((key for key in joins if f"{key}." in name), None)
        if first:
            joined, parts = joins[first]
            target = target.replace(first, joined)
            tensor = torch.cat([pt[name.replace(first, part)] for part in parts])
        elif any(f"{word}." in name for word in ("k_proj", "v_proj", "up_proj")):
            continue
        linear = tensor.dim() == 2 and re.search(r"(proj|mlp\.gate|lm_head)\.weight$", name)
        result[target] = tensor.T.contiguous() if linear else tensor.contiguous()
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_paddle_folder_written_by_hand_runs_here(tmp_path, case):
    """A round trip through our own table could hide a wrong order of columns; this cannot."""
    model = reference(case)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    paddle = as_paddle(load_file(path))
    path.unlink()
    save_file(paddle, path)
    loaded = load(tmp_path, dtype="float32")
    assert loaded.opened.layout == "paddle"
    assert_equal_logits(loaded.decoder.prompt_logits(TOKENS), their_logits(model))


def test_the_selection_bias_decides_in_these_models(tmp_path):
    """Without this, the parity above would not prove that the bias is read."""
    model = reference(CASES[3])
    before = their_logits(model)
    for name, parameter in model.named_parameters():
        if "correction_bias" in name:
            parameter.data.zero_()
    assert (their_logits(model) - before).abs().max() > 0.1


def test_the_old_class_name_and_remote_code_are_no_obstacle(tmp_path):
    model = reference(CASES[0])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Ernie4_5_ForCausalLM"], "auto_map": {"AutoModel": "modeling_ernie4_5.Ernie4_5_Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal_logits(load(tmp_path, dtype="float32").decoder.prompt_logits(TOKENS), their_logits(model))
