"""Every token that passes a layer of experts is counted once for each expert it chose, and models without experts count nothing."""

import pytest
import torch

from ernie45.engine.core import Engine, EngineConfig
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec
from tests.engine.peft_adapters import random_factors, write
from tests.engine.test_adapters import ask, engine_of
from tests.engine.test_engine import DENSE, EXPERTS, build, serve


def chosen_by_routers(decoder, tokens):
    """How often each expert of layers 1 and 2 is chosen when the layers compute these tokens at once."""
    seen = [[], []]
    hooks = [decoder.layers[i].ffn.router.register_forward_hook(lambda m, a, r, i=i: seen[i - 1].append(r.experts)) for i in (1, 2)]
    decoder.prompt_logits(tokens)
    for hook in hooks:
        hook.remove()
    num_experts = decoder.config.experts.num_experts
    return [tuple(torch.bincount(torch.cat(ids).flatten(), minlength=num_experts).tolist()) for ids in seen]


def test_counts_are_those_of_the_routers(tmp_path):
    decoder, prompt = build(EXPERTS), list(range(3, 20))
    engine = engine_of(decoder, tmp_path)
    answer = serve(engine, [ask(1, prompt)])["1"][0]
    counted = {bank.layer: bank.counts for bank in engine.experts_load()}
    assert set(counted) == {1, 2}
    assert [counted[1], counted[2]] == chosen_by_routers(decoder, [*prompt, *answer][:-1])  # the last token is sampled and never computed
    assert [sum(counted[layer]) for layer in (1, 2)] == [2 * (len(prompt) + len(answer) - 1)] * 2


def test_rows_with_adapters_are_counted_too(tmp_path):
    write(tmp_path / "voice", random_factors(EXPERTS, 1))
    engine = engine_of(build(EXPERTS), tmp_path)
    answer = serve(engine, [ask(1, range(3, 20), "voice")])["1"][0]
    assert [sum(bank.counts) for bank in engine.experts_load()] == [2 * (17 + len(answer) - 1)] * 2


def test_a_dense_model_has_none(tmp_path):
    assert engine_of(build(DENSE), tmp_path).experts_load() == ()


@pytest.mark.native
@pytest.mark.parametrize("kv", ["whole", "int8"])
def test_packed_experts_are_counted_whoever_computes_them(kernels, kv):
    """With a whole cache a step is one native call that asks none of our routers; they are the reference."""
    experts = ExpertsConfig(num_experts=5, top_k=2, expert_size=48, num_shared=1, first_layer=1, last_layer=2)
    config = TextConfig(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_size=32, ffn_size=96, vocab_size=97,
                        tie_embeddings=True, experts=experts)  # fmt: skip
    decoder, prompt = build(config), list(range(3, 20))
    quantise_model(decoder, QuantSpec.uniform("w4a8-g32"))
    engine = Engine(decoder, EngineConfig(kv=kv, num_pages=16, max_length=64))
    answer = serve(engine, [ask(1, prompt)])["1"][0]
    counted = [bank.counts for bank in engine.experts_load()]
    chosen = chosen_by_routers(decoder, [*prompt, *answer][:-1])
    assert [sum(counts_E) for counts_E in counted] == [2 * (len(prompt) + len(answer) - 1)] * 2
    # attention over a rounded cache may move a choice that is nearly even
    moved = sum(abs(a - b) for counts_E, others_E in zip(counted, chosen, strict=True) for a, b in zip(counts_E, others_E, strict=True))
    assert moved == 0 if kv == "whole" else moved <= 4
