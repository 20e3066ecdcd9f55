"""DoRA: direction and length of every row learn apart, and mean in PEFT what they mean here."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie45.models.adapters import load_adapter, save_adapter
from ernie45.models.save import save_model
from ernie45.nn.lora import LoraConfig, LoraLinear, adapt, adapters, merge, without_adapters
from ernie45.train.batch import Example, pack
from ernie45.train.optim import Optimiser, OptimiserConfig, decays, is_hidden_matrix
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder

TOKENS = [5, 9, 77, 300, 12, 8, 41]
# float32, other order of sums: PEFT makes the whole matrix to measure its rows, here they are measured without it
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapted(config, **how):
    """A tiny model whose adapters have learned something: neither B is 0 nor the lengths the first ones."""
    decoder = make_decoder(**how)
    generator = torch.Generator().manual_seed(1)
    adapt(decoder.layers, config, generator)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("adapter_b"):
                parameter.normal_(0, 0.05, generator=generator)
            if name.endswith("magnitude"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3, generator=generator))
            parameter.requires_grad_("adapter" in name or "magnitude" in name)
    return decoder


@pytest.mark.parametrize("experts", [False, True])
def test_it_starts_as_nothing_and_merges_to_what_it_computed(experts):
    decoder = make_decoder(experts=experts)
    plain = decoder.prompt_logits(TOKENS)
    adapt(decoder.layers, LoraConfig(rank=3, dora=True), torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoder.prompt_logits(TOKENS), plain, **CLOSE)
    learned = adapted(LoraConfig(rank=3, dora=True), experts=experts)
    with_adapters = learned.prompt_logits(TOKENS)
    assert not torch.allclose(with_adapters, plain, atol=1e-2)
    with without_adapters(learned):
        assert torch.equal(learned.prompt_logits(TOKENS), plain)
    merge(learned)
    torch.testing.assert_close(learned.prompt_logits(TOKENS), with_adapters, **CLOSE)


@pytest.mark.parametrize(("experts", "targets"), [(False, "all"), (True, "attention")])
def test_peft_computes_and_differentiates_what_we_do(tmp_path, experts, targets):
    from peft import PeftModel

    config = LoraConfig(rank=3, alpha=5, dora=True, targets=targets)
    decoder = adapted(config, experts=experts)
    save_adapter(decoder, tmp_path / "adapter", config, str(tmp_path / "base"))
    save_model(make_decoder(experts=experts), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        result = theirs(torch.tensor([TOKENS]), labels=torch.tensor([TOKENS]))
        result.loss.backward()
    torch.testing.assert_close(decoder.prompt_logits(TOKENS), result.logits[0].detach(), **CLOSE)
    ours = gradients(decoder)
    expected = {name.replace(".default", "").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {f"base_model.model.{name}".removesuffix(".weight"): grad for name, grad in ours.items()}
    assert set(found) == set(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    back = make_decoder(experts=experts)
    assert load_adapter(back, tmp_path / "again") == config
    torch.testing.assert_close(back.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS), **CLOSE)
    merge(decoder)
    save_model(decoder, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
        for name, value in theirs.merge_and_unload().state_dict().items():
            torch.testing.assert_close(value, merged[name], **CLOSE)


def gradients(decoder):
    """The gradient of the mean loss by PEFT's names for the factors."""
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig())
    kept = {}
    step.optimiser.step = lambda rate, norm: kept.update(
        {name: p.grad.clone() for name, p in decoder.named_parameters() if p.requires_grad}
    )
    step([pack([Example(tuple(TOKENS), tuple(TOKENS))])], 0, 0.0)
    files = {"attn.qkv": ("q_proj", "k_proj", "v_proj"), "attn.out": ("o_proj",)}
    files |= {"ffn.gate_up": ("gate_proj", "up_proj"), "ffn.down": ("down_proj",)}
    named = {}
    for place, layer in adapters(decoder).items():
        assert isinstance(layer, LoraLinear)
        _, number, kind = place.split(".", 2)
        a, b, m = (kept[f"{place}.{part}"] for part in ("adapter_a", "adapter_b", "magnitude.magnitude"))
        block = "self_attn" if kind.startswith("attn") else "mlp"
        for part, grads in zip(files[kind], zip(a.split(layer.rank), b.split(layer.parts), m.split(layer.parts), strict=True), strict=True):
            first = f"model.layers.{number}.{block}.{part}"
            named |= dict(zip((f"{first}.lora_A", f"{first}.lora_B", f"{first}.lora_magnitude_vector"), grads, strict=True))
    return named


def test_a_saved_adapter_of_experts_comes_back_to_the_bit(tmp_path):
    config = LoraConfig(rank=3, alpha=6, dora=True)
    decoder = adapted(config, experts=True)
    save_adapter(decoder, tmp_path, config, "base")
    back = make_decoder(experts=True)
    assert load_adapter(back, tmp_path) == config
    assert torch.equal(back.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS))


def test_adapters_and_lengths_learn_and_lengths_do_not_decay():
    decoder = make_decoder(experts=True)
    decoder.requires_grad_(False)
    adapt(decoder.layers, LoraConfig(rank=2, dora=True), torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig())
    losses = [step([make_batch()], n, 1e-2).loss for n in range(15)]
    assert losses[-1] < losses[0] - 0.5
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "adapter" in name or "magnitude" in name}
    lengths = {name: p for name, p in decoder.named_parameters() if name.endswith("magnitude")}
    assert any(p.ndim == 2 for p in lengths.values())
    assert not any(decays(name, p) or is_hidden_matrix(name, p) for name, p in lengths.items())
