"""Adapters: they start as nothing, merge to what they computed, and mean in PEFT what they mean here."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.adapters import load_adapter, save_adapter
from ernie45.models.save import save_model
from ernie45.nn.lora import LoraConfig, adapt, adapters, merge, without_adapters
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder

TOKENS = [5, 9, 77, 300, 12, 8, 41]
# float32, other order of sums, logits around 1
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapted(config=None, seed=1, **how):
    """A tiny model with adapters whose B is not 0."""
    decoder = make_decoder(**how)
    generator = torch.Generator().manual_seed(seed)
    adapt(decoder.layers, config or LoraConfig(rank=3), generator)
    decoder.requires_grad_(False)
    for layer in adapters(decoder).values():
        for name, parameter in layer.named_parameters():
            if name.endswith("adapter_b"):
                parameter.normal_(0, 0.05, generator=generator)
            parameter.requires_grad_(".adapter" in f".{name}")
    return decoder


@pytest.mark.parametrize("experts", [False, True])
def test_adapters_start_as_nothing(experts):
    decoder = make_decoder(experts=experts)
    before = decoder.prompt_logits(TOKENS)
    adapt(decoder.layers, LoraConfig(rank=4), torch.Generator().manual_seed(0))
    assert torch.equal(decoder.prompt_logits(TOKENS), before)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_merging_changes_no_logit(experts, rslora):
    decoder = adapted(LoraConfig(rank=3, rslora=rslora), experts=experts)
    names = set(make_decoder(experts=experts).state_dict())
    plain = make_decoder(experts=experts).prompt_logits(TOKENS)
    with without_adapters(decoder):
        assert torch.equal(decoder.prompt_logits(TOKENS), plain)
    with_adapters = decoder.prompt_logits(TOKENS)
    assert not torch.allclose(with_adapters, plain, atol=1e-3)
    merge(decoder)
    assert set(decoder.state_dict()) == names
    torch.testing.assert_close(decoder.prompt_logits(TOKENS), with_adapters, **CLOSE)


@pytest.mark.parametrize(("experts", "targets"), [(False, "all"), (False, "attention"), (True, "attention")])
def test_peft_computes_what_we_compute(tmp_path, experts, targets):
    from peft import PeftModel

    config = LoraConfig(rank=3, alpha=5, rslora=True, targets=targets)
    decoder = adapted(config, experts=experts)
    save_adapter(decoder, tmp_path / "adapter", config, str(tmp_path / "base"))
    ours = decoder.prompt_logits(TOKENS)
    save_model(make_decoder(experts=experts), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        with torch.no_grad():
            logits = theirs(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(ours, logits, **CLOSE)
    theirs.save_pretrained(tmp_path / "again")
    back = make_decoder(experts=experts)
    assert load_adapter(back, tmp_path / "again") == config
    assert torch.equal(back.prompt_logits(TOKENS), ours)


@pytest.mark.parametrize("experts", [False, True])
def test_a_saved_adapter_comes_back_to_the_bit(tmp_path, experts):
    config = LoraConfig(rank=3)
    decoder = adapted(config, experts=experts)
    save_adapter(decoder, tmp_path, config, "base")
    back = make_decoder(experts=experts)
    assert load_adapter(back, tmp_path).scale == config.scale
    assert torch.equal(back.prompt_logits(TOKENS), decoder.prompt_logits(TOKENS))
    with pytest.raises(CheckpointError, match="holds an adapter already"):
        save_adapter(decoder, tmp_path, config, "base")


def test_only_adapters_learn():
    decoder = make_decoder(experts=True)
    decoder.requires_grad_(False)
    adapt(decoder.layers, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(b_rate=4.0), 16), LossConfig())
    losses = [step([make_batch()], n, 1e-2).loss for n in range(15)]
    assert losses[-1] < losses[0] - 0.5
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.endswith(("adapter_a", "adapter_b")) for name in moved)
    assert {name for name in before if "adapter" in name} == moved


def test_lora_plus_moves_b_faster():
    decoder = make_decoder()
    adapt(decoder.requires_grad_(False).layers, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(b_rate=8.0, weight_decay=0.0), 16), LossConfig())
    step([make_batch()], 0, 1e-3)
    assert decoder.layers[0].attn.qkv.adapter_b.abs().max().item() == pytest.approx(8e-3, rel=1e-2)


def test_strength_and_scale():
    assert LoraConfig(rank=16).scale == 2
    assert LoraConfig(rank=16, rslora=True).scale == 1
    assert LoraConfig(rank=4, alpha=32).scale == 8
    for wrong in ({"rank": -1}, {"alpha": 0.0}):
        with pytest.raises(ConfigError, match="lora"):
            LoraConfig(**wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "missing 28, first .*lora_magnitude_vector"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"r": "many"}, "no PEFT adapter config"),
        ({"r": 4}, "needs"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "unexpected"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, change, says):
    config = LoraConfig(rank=3)
    save_adapter(adapted(config), tmp_path, config, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=says):
        load_adapter(make_decoder(), tmp_path)


def test_a_folder_without_an_adapter_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="is this a PEFT adapter folder"):
        load_adapter(make_decoder(), tmp_path)
