"""Whole steps over bfloat16 matrices against transformers in float32: files it wrote, loaded as an engine loads them."""

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM
from transformers.utils import logging

from ernie45.models.load import load
from tests.native.test_step import Served

pytestmark = pytest.mark.native

TOKENS = [(7 * place) % 101 for place in range(45)]
BASE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1, "moe_num_shared_experts": 1}


def theirs(experts, folder):
    """A random model whose numbers are all bfloat16, written to `folder`, and then read from there to compute in float32."""
    logging.disable_progress_bar()
    torch.manual_seed(3)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**BASE, **EXPERTS)) if experts else Ernie4_5ForCausalLM(Ernie4_5Config(**BASE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if name.endswith("norm.weight") else parameter.normal_(0, 0.2)
    model.bfloat16().save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_steps_are_transformers_in_float32(each, dtype, experts, tmp_path):
    """float32: no number is rounded, sums run in another order. bfloat16: 8 bits between the layers; whoever chooses experts with those may
    choose others, and then nothing can be compared, so experts are compared in float32."""
    if experts:
        dtype = "float32"
    model = theirs(experts, tmp_path)
    with torch.inference_mode():
        want = model(torch.tensor([TOKENS])).logits[0]
    assert want.abs().max() > 1, "logits this small would hide an error"
    decoder = load(tmp_path, dtype=dtype, compact=True).decoder
    assert decoder.layers[0].attn.qkv.weight.dtype == torch.bfloat16
    served, at = Served(decoder, each), 0
    for end in (40, 41, 45):  # a prompt, a token, several
        got = served.feed({0: TOKENS[at:end]})[0]
        assert (got - want[end - 1]).abs().max() <= (1e-4 if dtype == "float32" else 0.04) * want.abs().max()
        at = end
