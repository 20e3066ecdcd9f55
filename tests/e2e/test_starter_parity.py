"""The starter against the model it was made from: transformers reads the same GGUF file as a Llama model, by code none of us wrote."""

import warnings

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie45.models.load import load_model
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.weights.gguf import open_gguf

CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one short sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one, please."},
    ],
)
# Both sum in float32 in different orders (one fused matrix for q, k, v against three): logits reach 45, of which float32 resolves 4e-6;
# 2e-4 is what 30 layers of such roundings were seen to stay under, a tenth of it is typical. A wrong row order moves them by 20.
TOLERANCE = 2e-4

# transformers takes 30 s to read the file on an idle core, and three times that on a shared one
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ours(starter):
    return load_model(starter, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(starter):
    return load_tokenizer(starter)


@pytest.fixture(scope="module")
def theirs(source_gguf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(source_gguf.parent, gguf_file=source_gguf.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def template(source_gguf):
    """The template as the source file carries it, rendered by plain Jinja."""
    with open_gguf(source_gguf) as file:
        return jinja2.Environment().from_string(file.metadata["tokenizer.chat_template"])


def reply(next_token, ids, count):
    """Greedy continuation of `ids` by `count` tokens, or to the end of the answer."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != 2):
        ids.append(next_token(ids))
    return ids[start:]


@torch.inference_mode()
def test_every_weight_is_the_source_models(ours, theirs):
    """Bit for bit; q and k are compared in ERNIE's row order."""
    mine, other = ours.state_dict(), theirs.state_dict()
    heads, kv_heads, size = ours.config.num_heads, ours.config.num_kv_heads, ours.config.head_size

    def paired(weight, count):
        return weight.view(count, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)

    assert torch.equal(mine["embed.weight"], other["model.embed_tokens.weight"])
    for layer in range(ours.config.num_layers):
        name = f"model.layers.{layer}"
        qkv = [paired(other[f"{name}.self_attn.q_proj.weight"], heads), paired(other[f"{name}.self_attn.k_proj.weight"], kv_heads)]
        assert torch.equal(mine[f"layers.{layer}.attn.qkv.weight"], torch.cat([*qkv, other[f"{name}.self_attn.v_proj.weight"]]))
        gate_up = [other[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(mine[f"layers.{layer}.ffn.gate_up.weight"], torch.cat(gate_up))
        assert torch.equal(mine[f"layers.{layer}.ffn.down.weight"], other[f"{name}.mlp.down_proj.weight"])
        assert torch.equal(mine[f"layers.{layer}.attn.out.weight"], other[f"{name}.self_attn.o_proj.weight"])


@torch.inference_mode()
def test_logits_are_the_source_models(ours, theirs, tokenizer, starter):
    ids = tokenizer.encode((starter / "LICENSE").read_text())[:384]
    mine, other = ours.prompt_logits(ids), theirs(torch.tensor([ids])).logits[0]
    assert (mine - other).abs().max() < TOLERANCE
    assert torch.equal(mine.argmax(-1), other.argmax(-1))


@torch.inference_mode()
@pytest.mark.parametrize("chat", CHATS)
def test_greedy_chats_are_the_source_models(chat, ours, theirs, tokenizer, template):
    ids = tokenizer.encode(template.render(messages=chat, add_generation_prompt=True), allow_special=True)
    mine = reply(lambda ids: int(ours.prompt_logits(ids)[-1].argmax()), ids, 16)
    other = reply(lambda ids: int(theirs(torch.tensor([ids])).logits[0, -1].argmax()), ids, 16)
    assert mine == other
    assert tokenizer.decode(mine).strip()


@torch.inference_mode()
def test_transformers_runs_the_folder_as_ernie_with_our_logits(starter, ours, tokenizer):
    """Their Ernie4_5ForCausalLM on our folder: config, names and layout are right for others too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(starter).eval()
    assert type(model).__name__ == "Ernie4_5ForCausalLM"
    ids = tokenizer.encode("The same folder, read by other people's code, must be the same model.")
    assert (model(torch.tensor([ids])).logits[0] - ours.prompt_logits(ids)).abs().max() < TOLERANCE
