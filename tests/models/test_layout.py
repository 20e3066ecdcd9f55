"""How a model splits: every number is somewhere, what ranks compute adds up to the whole, what does not come out even is refused."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError
from ernie45.models.counts import count_parameters
from ernie45.models.layout import Layout, cuts_of, own_shape, spans, stages, stages_of, token_spans
from ernie45.models.released import CHECKPOINTS, tiny
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig
from ernie45.nn.attention import PackedCausal
from ernie45.plan.split import Weight, split, split_text
from tests.sighted import VISION

MODELS = {
    "dense": ModelConfig(replace(tiny(), use_bias=True, tie_embeddings=False)),
    "experts": ModelConfig(replace(tiny(experts=True), num_mtp=1)),
    "sighted": ModelConfig(tiny(experts=True), VISION),
}


def made(config, device=None):
    with torch.device(device or "cpu"):
        decoder = Decoder(config.text, config.vision)
    return decoder if device else decoder.initialise(torch.Generator().manual_seed(0), std=0.1).eval()


def piece(name, whole, config, layout, **ranks):
    """What one rank has of a tensor."""
    for cut in cuts_of(name, config):
        own = spans(cut, getattr(layout, cut.axis), ranks.get(cut.axis, 0))
        whole = torch.cat([whole.narrow(cut.dim, first, end - first) for first, end in own], dim=cut.dim)
    return whole


def halves(decoder, config):
    """The models of two tensor ranks: the same network, half as wide inside."""
    text = config.text
    half = replace(text, num_heads=2, num_kv_heads=1, ffn_size=text.ffn_size // 2, vocab_size=text.vocab_size // 2)
    if text.experts:
        half = replace(half, experts=replace(text.experts, expert_size=text.experts.expert_size // 2))
    vision = config.vision and replace(config.vision, expert_size=config.vision.expert_size // 2)
    for rank in range(2):
        small = Decoder(half, vision)
        small.load_state_dict({name: piece(name, p, config, Layout(tensor=2), tensor=rank) for name, p in decoder.state_dict().items()})
        yield small.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_held_once_or_is_a_copy(name):
    config, layout = MODELS[name], Layout(tensor=2, expert=4)
    for tensor_name, tensor in made(config, "meta").named_parameters():
        numbers = torch.arange(tensor.numel()).view(tensor.shape)
        cut = {c.axis for c in cuts_of(tensor_name, config)}
        ranks = product(range(2) if "tensor" in cut else [0], range(4) if "expert" in cut else [0])
        pieces = [piece(tensor_name, numbers, config, layout, tensor=t, expert=e) for t, e in ranks]
        assert {tuple(p.shape) for p in pieces} == {own_shape(tensor_name, tensor.shape, config, layout)}, tensor_name
        assert torch.equal(torch.cat([p.flatten() for p in pieces]).sort().values, numbers.flatten()), tensor_name


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_tensor_ranks_compute_adds_up(name):
    """`out` and `down` give parts of a sum; words are looked up where they are, and scored side by side."""
    config = MODELS[name]
    decoder = made(config)
    if config.text.use_bias:  # it is added once, behind the sum
        for name, p in decoder.named_parameters():
            if name.endswith(("out.bias", "down.bias")):
                p.zero_()
    ranks = list(halves(decoder, config))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    turns, attend = decoder.turns(torch.arange(9)), PackedCausal([4, 9])
    close = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums in another order
    for layer, parts in zip(decoder.layers, zip(*(rank.layers for rank in ranks), strict=True), strict=True):
        torch.testing.assert_close(sum(part.attn(x, turns, attend) for part in parts), layer.attn(x, turns, attend), **close)
        torch.testing.assert_close(sum(part.ffn(x) for part in parts), layer.ffn(x), **close)
        if config.vision and hasattr(layer.ffn, "vision"):
            torch.testing.assert_close(sum(part.ffn.vision(x) for part in parts), layer.ffn.vision(x), **close)
    tokens, half = torch.tensor([3, 400, 255, 256, 11]), config.text.vocab_size // 2
    found = sum((tokens // half == r)[:, None] * rank.embed(tokens % half) for r, rank in enumerate(ranks))
    torch.testing.assert_close(found, decoder.embed(tokens))
    torch.testing.assert_close(torch.cat([rank.logits(x) for rank in ranks], dim=1), decoder.logits(x), **close)


@torch.no_grad()
def test_what_expert_ranks_compute_adds_up():
    config, layout = MODELS["experts"], Layout(expert=4)
    layer = made(config).layers[1].ffn
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    routing, total = layer.router(x), torch.zeros(20, 64)
    whole = layer.experts(x, routing)
    for rank in range(4):
        alone = {}
        for part, stack in (("gate_up", layer.experts.gate_up), ("down", layer.experts.down)):
            ((first, end),) = spans(cuts_of(f"layers.1.ffn.experts.{part}", config)[0], 4, rank)
            alone[part] = torch.zeros_like(stack)
            alone[part][first:end] = piece(f"layers.1.ffn.experts.{part}", stack, config, layout, expert=rank)
        own = torch.func.functional_call(layer.experts, alone, (x, routing))
        assert own.any()
        total += own
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


def test_few_key_heads_are_copied_to_neighbours():
    config = MODELS["dense"]  # four heads of queries, two of keys
    (cut,) = cuts_of("layers.0.attn.qkv.weight", config)
    assert [spans(cut, 4, rank)[1] for rank in range(4)] == [(128, 160), (128, 160), (160, 192), (160, 192)]
    assert [spans(cut, 4, rank)[0] for rank in range(4)] == [(0, 32), (32, 64), (64, 96), (96, 128)]


@given(layers=st.integers(1, 60), pipeline=st.integers(1, 60))
def test_stages_have_all_layers_in_order_and_evenly(layers, pipeline):
    if pipeline > layers:
        with pytest.raises(ConfigError, match=f"the model has {layers} layers"):
            stages(layers, pipeline)
        return
    found = stages(layers, pipeline)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    lengths = [len(stage) for stage in found]
    assert max(lengths) - min(lengths) <= 1
    assert pipeline < 3 or max(lengths[0], lengths[-1]) <= max(lengths[1:-1])


@settings(deadline=None)
@given(tokens=st.integers(1, 3000), ranks=st.integers(1, 8))
def test_tokens_of_a_row_are_each_somewhere_and_cost_the_same(tokens, ranks):
    parts = [token_spans(tokens, ranks, rank) for rank in range(ranks)]
    assert sorted(t for spans in parts for first, end in spans for t in range(first, end)) == list(range(tokens))
    work = [sum(t + 1 for first, end in spans for t in range(first, end)) for spans in parts]  # pairs that see each other
    assert max(work) - min(work) <= 2 * tokens  # the pieces differ by a token at most


def test_who_holds_both_ends():
    tied, apart = MODELS["experts"], MODELS["dense"]
    assert stages_of("embed.weight", tied, 3) == (0, 2)
    assert stages_of("embed.weight", apart, 3) == (0,)
    assert stages_of("embed.weight", tied, 1) == (0,)
    assert [stages_of(name, apart, 2) for name in ("head.weight", "norm.weight", "layers.1.attn.out.weight")] == [(1,), (1,), (0,)]
    assert stages_of("mtp.project.weight", tied, 2) == (1,)
    assert stages_of("sight.resampler.norm.weight", MODELS["sighted"], 2) == (0,)


def weights_of(config, bytes_each=2):
    return [Weight(name, tuple(p.shape), bytes_each) for name, p in made(config, "meta").named_parameters()]


@pytest.mark.parametrize("name", ["ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B", "ERNIE-4.5-VL-28B-A3B"])
def test_a_published_model_splits_into_what_was_counted(name):
    release = CHECKPOINTS[name]
    config, count = ModelConfig(release.text, release.vision), count_parameters(release.text, release.vision)
    weights = weights_of(config)
    (whole,) = split(weights, config, Layout())
    assert whole.numbers == count.total + count.mtp
    (stage,) = split(weights, config, Layout(expert=8))
    experts = count.routed_experts + count.vision_experts
    assert (stage.numbers, stage.bytes) == (whole.numbers - experts * 7 // 8, 2 * stage.numbers)
    four = split(weights, config, Layout(pipeline=4))
    both_ends = count.embedding if release.text.tie_embeddings or release.text.num_mtp else 0
    assert sum(stage.numbers for stage in four) == whole.numbers + both_ends
    (narrow,) = split(weights, config, Layout(tensor=4))
    size = release.text.hidden_size
    block = count.mtp - 2 * size * size - 4 * size if count.mtp else 0  # its projection and norms are copies
    cut = count.embedding + count.head + count.attention + count.dense + count.shared_experts + experts + block
    assert narrow.numbers == whole.numbers - cut * 3 // 4


def test_the_text_names_what_is_cut():
    config = MODELS["experts"]
    text = split_text(weights_of(config), config, Layout(tensor=2, expert=4, pipeline=2, context=2), 64)
    assert "layout: tensor 2 x expert 4 x pipeline 2 x context 2 = 32 ranks" in text
    assert "stage 2 of 2, layers 2 to 3: " in text
    assert "of a row of 64 tokens the first rank has 0 to 15 and 48 to 63" in text
    assert "layers.{1..3}.ffn.experts.gate_up: [8, 128, 64] -> [2, 64, 64] (expert along 0, tensor along 1)" in text
    assert Counter("norm" in line for line in text.splitlines())[True] == 0


def test_what_does_not_come_out_even_is_refused_by_name():
    config = MODELS["experts"]
    with pytest.raises(ConfigError, match=r"layout.tensor 3 does not suit embed.weight \[512, 64\]: 512 cannot be"):
        split(weights_of(config), config, Layout(tensor=3))
    with pytest.raises(ConfigError, match=r"layout.expert 16 does not suit layers.1.ffn.experts.gate_up"):
        split(weights_of(config), config, Layout(expert=16))
    with pytest.raises(ConfigError, match=r"no rule for layers\.0\.attn\.qkv\.adapter_a"):
        cuts_of("layers.0.attn.qkv.adapter_a", config)
    with pytest.raises(ConfigError, match=r"layout\.context must be at least 1, not 0"):
        Layout(context=0)
