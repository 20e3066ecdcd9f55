"""Whole networks, quantised in place: close to the original, same names, the same through the packed-checkpoint door."""

import pytest
import torch

from ernie45.errors import ConfigError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal
from ernie45.quant.block import QuantBlock
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from ernie45.quant.model import prepare_model, quantise_model
from ernie45.quant.spec import QuantSpec, Rule

SIZES = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 32, "ffn_size": 96, "vocab_size": 160,
    "rope_theta": 5e5, "norm_eps": 1e-5, "max_positions": 64,
}  # fmt: skip
EXPERTS = ExpertsConfig(num_experts=4, top_k=2, expert_size=48, num_shared=1, first_layer=1, last_layer=1, interval=1)
TOKENS = list(range(3, 40))


def decoder(**changes):
    config = TextConfig(**{**SIZES, "tie_embeddings": True, **changes})
    return Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.08)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


# 8 bits: steps of 1/127 of the largest of a group, about 0.3 % of a term's size each in weight and activation. 4 bits: 8 % of a weight.
@pytest.mark.parametrize(("scheme", "bound"), [("w8a8-g32", 0.02), ("w8a8", 0.03), ("w4a8-g32", 0.25)])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"experts": EXPERTS}, {"use_bias": True}])
def test_logits_stay_close(scheme, bound, changes):
    network = decoder(**changes)
    want = network.prompt_logits(TOKENS)
    names = {name for name, _ in network.named_modules()}
    quantise_model(network, QuantSpec.uniform(scheme))
    assert {name for name, _ in network.named_modules()} == names, "names are what the tables of a checkpoint go by"
    got = network.prompt_logits(TOKENS)
    # near ties the router may choose another expert, which with random weights is another answer for that token
    assert 1e-6 < relative(got, want) < (max(bound, 0.12) if changes.get("experts") else bound)
    if not changes.get("experts"):
        return
    assert isinstance(network.layers[1].ffn.experts, QuantExperts)
    assert network.layers[1].ffn.router.weight.dtype == torch.float32


def test_what_becomes_of_the_modules():
    network = decoder()
    heard = []
    quantise_model(network, QuantSpec.uniform("w4a8-g32", head="w8a8-g32"), each=heard.append)
    assert heard[0] == "embed"
    assert isinstance(network.embed, QuantEmbedding)
    assert network.embed.scheme.weight_bits == 8
    assert all(isinstance(layer, QuantBlock) for layer in network.layers)
    assert set(network.layers[0].attn.qkv.state_dict()) == {"weight_packed", "weight_scale"}
    assert not [name for name, parameter in network.named_parameters() if "norm" not in name], "only norms stay whole"


def test_fused_blocks_equal_the_parts_they_were_made_of():
    fused, plain = decoder(), decoder()
    quantise_model(fused, QuantSpec.uniform("w4a8-g32"))
    for name in [name for name, _ in plain.named_modules()]:
        if name and isinstance(fused.get_submodule(name), QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, fused.get_submodule(name))
    x, positions = fused.embed(torch.tensor(TOKENS)), torch.arange(len(TOKENS))
    with torch.inference_mode():
        got, want = (n(x, positions, PackedCausal([len(TOKENS)])) for n in (fused, plain))
    # an activation on the edge of two steps may fall on either side, once in a while
    assert relative(got, want) < 2e-2


def test_a_packed_state_fills_an_empty_network():
    spec = QuantSpec.uniform("w4a8-g32", head="w8a8")
    whole = decoder(experts=EXPERTS)
    quantise_model(whole, spec)
    with torch.device("meta"):
        empty = Decoder(whole.config)
    prepare_model(empty, spec)
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty.prompt_logits(TOKENS), whole.prompt_logits(TOKENS))


def test_specs_are_checked_before_anything_changes():
    network = decoder()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"embed"):
        quantise_model(network, QuantSpec(rules=(Rule(pattern="layers.*", scheme="w4a8"),)))
    assert before.keys() == network.state_dict().keys()
    quantise_model(network, QuantSpec(rules=(Rule(pattern="*.qkv", scheme="w8a8"), Rule(pattern="*", scheme=None))))
    assert isinstance(network.layers[0].attn.qkv, QuantLinear)
    assert not isinstance(network.layers[0], QuantBlock)


def test_bfloat16_networks_stay_bfloat16():
    network = decoder().bfloat16()
    want = network.prompt_logits(TOKENS)
    quantise_model(network, QuantSpec.uniform("w8a8-g32"))
    assert network.dtype == torch.bfloat16
    assert relative(network.prompt_logits(TOKENS), want) < 0.04  # bfloat16 itself loses 0.5 % a layer
