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


def test_counts_are_those_of_the_routers(tmp_path):
    decoder, prompt = build(EXPERTS), list(range(3, 20))
    engine = engine_of(decoder, tmp_path)
    answer = serve(engine, [ask(1, prompt)])["1"][0]
    seen = [[], []]
    hooks = [decoder.layers[i].ffn.router.register_forward_hook(lambda m, a, r, i=i: seen[i - 1].append(r.experts)) for i in (1, 2)]
    counted = {bank.layer: bank.counts for bank in engine.experts_load()}
    decoder.prompt_logits([*prompt, *answer][:-1])  # the last token is sampled and never computed
    for hook in hooks:
        hook.remove()
    assert set(counted) == {1, 2}
    for layer in (1, 2):
        chosen = torch.cat(seen[layer - 1]).flatten()
        assert counted[layer] == tuple(torch.bincount(chosen, minlength=6).tolist())
        assert sum(counted[layer]) == 2 * (len(prompt) + len(answer) - 1)


def test_rows_with_adapters_are_counted_too(tmp_path):
    write(tmp_path / "voice", random_factors(EXPERTS, 1))
    engine = engine_of(build(EXPERTS), tmp_path)
    answer = serve(engine, [ask(1, range(3, 20), "voice")])["1"][0]
    assert [sum(bank.counts) for bank in engine.experts_load()] == [2 * (17 + len(answer) - 1)] * 2


def test_a_dense_model_has_none(tmp_path):
    assert engine_of(build(DENSE), tmp_path).experts_load() == ()


@pytest.mark.native
@pytest.mark.parametrize(("kv", "counted"), [("whole", False), ("int8", True)])
def test_packed_experts_are_counted_or_said_not_to_be(kv, counted):
    """Numbers that stand still at zero would be a lie: a step in one native call asks none of the routers."""
    experts = ExpertsConfig(num_experts=5, top_k=2, expert_size=48, num_shared=1, first_layer=1, last_layer=2)
    config = TextConfig(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_size=32, ffn_size=96, vocab_size=97,
                        tie_embeddings=True, experts=experts)  # fmt: skip
    decoder = build(config)
    quantise_model(decoder, QuantSpec.uniform("w4a8-g32"))
    engine = Engine(decoder, EngineConfig(kv=kv, num_pages=16, max_length=64))
    answer = serve(engine, [ask(1, range(3, 20))])["1"][0]
    assert engine.uncounted is not counted
    assert [sum(bank.counts) for bank in engine.experts_load()] == ([2 * (17 + len(answer) - 1)] * 2 if counted else [])
