"""Adapters in the engine: every row of a mixed step gets the logits of its own merged model; strangers' files end in words."""

import dataclasses
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import Request, SamplingParams
from ernie45.errors import ConfigError, RequestError
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.models.adapter_layers import read_adapter_layers
from ernie45.models.load import load_model
from ernie45.models.save import save_model
from ernie45.models.vision_config import ModelConfig
from ernie45.nn.row_adapters import StepAdapters, beside
from ernie45.quant.model import quantise_model, unfuse
from ernie45.quant.spec import QuantSpec
from tests.engine.peft_adapters import merged, random_factors, write
from tests.engine.test_engine import DENSE, EOS, EXPERTS, build, naive, serve

# float32 logits around 10: the merged weight is rounded once, the pair is summed in another order
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
WAYS = {
    "all": lambda target: True,
    "attention": lambda target: "self_attn" in target,
    "one": lambda target: target.endswith(("layers.1.self_attn.v_proj", "layers.1.mlp.experts.2.up_proj", "layers.0.mlp.down_proj")),
}


@pytest.fixture(scope="module", params=[DENSE, EXPERTS], ids=["dense", "experts"])
def family(request, tmp_path_factory):
    """A bare decoder, its adapters' folder, and a merged decoder for each adapter."""
    root, decoder = tmp_path_factory.mktemp("adapters"), build(request.param)
    whole = {"": decoder}
    for seed, (name, keep) in enumerate(WAYS.items()):
        rank = 1 + seed
        factors = random_factors(request.param, seed, rank, keep, size=0.2)
        write(root / name, factors, rank=rank, alpha=2.0 * rank, use_rslora=name == "all")
        scale = 2.0 * rank / (rank**0.5 if name == "all" else rank)
        whole[name] = merged(build(request.param), factors, scale)
    return decoder, root, whole


def engine_of(decoder, root, **how):
    config = {"page_size": 4, "num_pages": 60, "max_length": 100, **how}
    return Engine(decoder, EngineConfig(**config), adapters=AdapterFolder(root))


def ask(i, prompt, adapter="", **params):
    chosen = SamplingParams(**{"temperature": 0, "max_tokens": 6, **params})
    return Request(id=str(i), prompt=tuple(prompt), params=chosen, adapter=adapter, eos_ids=(EOS,))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["", *WAYS]), st.integers(1, 9)), min_size=1, max_size=6),
    budget=st.integers(3, 24),
    seed=st.integers(0, 99),
)
def test_each_row_of_a_mixed_step_is_its_own_model(family, rows, budget, seed):
    decoder, root, whole = family
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 67, (length,), generator=generator).tolist() for _, length in rows]
    engine = engine_of(decoder, root, token_budget=budget)
    asked = [ask(i, prompt, name, logprobs=1, prompt_logprobs=0) for i, (prompt, (name, _)) in enumerate(zip(prompts, rows, strict=True))]
    answers = serve(engine, asked)
    for i, (prompt, (name, _)) in enumerate(zip(prompts, rows, strict=True)):
        tokens, logprobs, scored, _ = answers[str(i)]
        logits = whole[name].prompt_logits([*prompt, *tokens]).log_softmax(-1)
        found = torch.tensor([entry.logprob for entry in [*scored, *logprobs]])
        wanted = torch.tensor([float(logits[place, token]) for place, token in enumerate([*prompt, *tokens][1:])])
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_prefixes_are_shared_within_an_adapter_only(family):
    decoder, root, whole = family
    prompt = list(range(3, 30))
    engine = engine_of(decoder, root)
    for round_ in range(2):
        for name in ("", "attention", "all"):
            answers = serve(engine, [ask(f"{round_}{name}", prompt, name)])
            assert answers[f"{round_}{name}"][0] == naive(whole[name], prompt, 6)
            assert engine.load.cached_tokens == (0 if round_ == 0 else (1 + ["", "attention", "all"].index(name)) * 24)


def test_a_changed_adapter_is_loaded_anew_and_shares_no_page(family, tmp_path):
    decoder, _, _ = family
    prompt, config = list(range(3, 30)), decoder.config
    old, new = random_factors(config, 50), random_factors(config, 51)
    write(tmp_path / "voice", old)
    engine = engine_of(decoder, tmp_path)
    first = serve(engine, [ask(1, prompt, "voice")])["1"][0]
    write(tmp_path / "voice", new)
    os.utime(tmp_path / "voice" / "adapter_config.json", (1, 1))
    answers = serve(engine, [ask("new", prompt, "voice")])
    assert answers["new"][0] == naive(merged(build(config), new, 2.0), prompt, 6)
    assert first == naive(merged(build(config), old, 2.0), prompt, 6)
    assert engine.load.cached_tokens == 0
    assert len(engine._adapters.loaded) == 2  # the old one stays until its place is needed
    os.utime(tmp_path / "voice" / "adapter_config.json", (2, 2))
    assert serve(engine, [ask("same", prompt, "voice")])["same"] == answers["new"]
    assert engine.load.cached_tokens == 24, "only the times of its files are new"


def test_a_request_that_began_with_a_version_ends_with_it(family, tmp_path):
    decoder, _, _ = family
    prompt, config = [5, 9, 40, 8], decoder.config
    old = random_factors(config, 50)
    write(tmp_path / "voice", old)
    engine = engine_of(decoder, tmp_path)
    engine.submit(ask("old", prompt, "voice", max_tokens=12))
    engine.step()
    write(tmp_path / "voice", random_factors(config, 51))
    tokens = []
    while not engine.idle:
        tokens += [token for output in engine.step() for token in output.tokens]
    wanted = naive(merged(build(config), old, 2.0), prompt, 12)
    assert tokens == wanted[1:]


def test_unused_adapters_leave_and_used_ones_stay(family):
    decoder, root, _ = family
    engine = engine_of(decoder, root, max_adapters=2)
    engine.submit(ask(1, [4, 5], "all", max_tokens=20))
    for name in ("attention", "one"):
        engine.submit(ask(name, [4, 5], name, max_tokens=1))
        while any(request.startswith(name) for request in engine._adapters._held):
            engine.step()
    assert [version.partition("@")[0] for version in engine._adapters.loaded] == ["all", "one"]
    engine.submit(ask(2, [4, 5], "one", max_tokens=20))
    with pytest.raises(RequestError, match=r"2 adapters of .* are in use; at most 2"):
        engine.submit(ask(3, [4, 5], "attention"))
    engine.cancel("2")
    engine.submit(ask(3, [4, 5], "attention"))
    engine.cancel("1")
    engine.cancel("3")
    assert engine.idle
    assert not engine._adapters._held


def test_an_id_that_is_alive_keeps_its_adapter(family):
    decoder, root, whole = family
    engine = engine_of(decoder, root)
    engine.submit(ask(1, [4, 5, 6], "attention"))
    with pytest.raises(RequestError, match="already alive"):
        engine.submit(ask(1, [4, 5, 6], "all"))
    tokens = []
    while not engine.idle:
        tokens += [token for output in engine.step() for token in output.tokens]
    assert tokens == naive(whole["attention"], [4, 5, 6], 6)


def test_bare_steps_use_the_bare_network(family):
    decoder, root, _ = family
    engine = engine_of(decoder, root)
    serve(engine, [ask(1, [4, 5, 6])])
    assert engine._adapters._beside is None
    serve(engine, [ask(2, [4, 5, 6], "one")])
    twin = engine._adapters._beside
    assert {id(tensor) for tensor in twin.parameters()} == {id(tensor) for tensor in decoder.parameters()}, "no weight is there twice"
    assert engine._adapters.network(["3"], [(0, 4)]) is decoder


def test_texts_are_embedded_with_their_adapter(family):
    decoder, root, whole = family
    engine, tokens = engine_of(decoder, root), [7, 8, 9]
    plain = engine_of(whole["all"], root).embed(tokens)
    torch.testing.assert_close(torch.tensor(engine.embed(tokens, "all")), torch.tensor(plain), **CLOSE)
    assert not torch.allclose(torch.tensor(engine.embed(tokens)), torch.tensor(plain), atol=1e-3)


def off(found, wanted):
    return float((found - wanted).abs().mean() / wanted.abs().mean())


@pytest.mark.parametrize("base", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_packed_base_takes_adapters(base, tmp_path):
    """Its fused blocks are taken apart, and what adapters add is computed in floats: no further from the merged floats than the base is."""
    experts = base.experts and dataclasses.replace(base.experts, expert_size=32)
    config = dataclasses.replace(base, hidden_size=64, head_size=16, ffn_size=64, experts=experts)
    whole, packed, prompt = build(config), build(config), list(range(4, 24))
    quantise_model(packed, QuantSpec.uniform("w8a8"))
    factors = random_factors(config, 3, keep=lambda target: not target.endswith("gate"))
    write(tmp_path / "voice", factors)
    layers, _ = read_adapter_layers(tmp_path / "voice", ModelConfig(config), torch.float32, 1 << 20)
    rows = StepAdapters()
    twin = beside(packed, rows, unfuse)
    bare_error = off(packed.prompt_logits(prompt), whole.prompt_logits(prompt))
    rows.tell([], len(prompt))
    assert off(twin.prompt_logits(prompt), packed.prompt_logits(prompt)) < bare_error
    rows.tell([(layers, range(len(prompt)))], len(prompt))
    found = twin.prompt_logits(prompt)
    wanted = merged(build(config), factors, 2.0).prompt_logits(prompt)
    assert off(found, wanted) < 3 * bare_error
    assert off(found, whole.prompt_logits(prompt)) > 10 * bare_error


@pytest.mark.parametrize("how", ["all-linear", "names", "patterns"])
@pytest.mark.parametrize("base", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_peft_means_what_we_compute(base, how, tmp_path):
    """PEFT trains transformers' stacked experts and the router too; its own logits are the reference."""
    warnings.simplefilter("ignore")  # PEFT speaks about its own parts
    import peft
    import transformers

    save_model(build(base), tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    targets = {"all-linear": "all-linear", "names": ["q_proj", "v_proj"], "patterns": ["q_proj", "o_proj"]}[how]
    more = {"alpha_pattern": {"o_proj": 7.0}, "rank_pattern": {"q_proj": 5}} if how == "patterns" else {}
    if how == "names" and base.experts:
        more = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
    settings_ = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets, use_rslora=how == "patterns", **more)
    theirs = peft.get_peft_model(theirs, settings_)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    theirs.save_pretrained(tmp_path / "adapters" / "voice")
    prompt = [5, 9, 40, 8, 61, 3]
    with torch.no_grad():
        wanted = theirs(torch.tensor([prompt])).logits[0]
    decoder = load_model(tmp_path / "model", dtype="float32")
    layers, size = read_adapter_layers(tmp_path / "adapters" / "voice", decoder.model_config, torch.float32, 1 << 20)
    assert 0 < size < 1 << 20
    rows = StepAdapters()
    twin = beside(decoder, rows, unfuse)
    rows.tell([(layers, range(len(prompt)))], len(prompt))
    torch.testing.assert_close(twin.prompt_logits(prompt), wanted, **CLOSE)
    assert not torch.allclose(decoder.prompt_logits(prompt), wanted, atol=0.1)


HOSTILE = {
    "DoRA": ({"use_dora": True}, None),
    "biases": ({"bias": "all"}, None),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None),
    "only LORA is read": ({"peft_type": "IA3"}, None),
    "lora_alpha must be a number": ({"alpha": float("nan")}, None),
    "holds the expression": ({"alpha_pattern": {"(a+)+$": 3.0}}, None),
    "this model's is": ({}, {"layers.0.self_attn.q_proj": (torch.zeros(2, 31), torch.zeros(48, 2))}),
    "no common rank": ({}, {"layers.0.self_attn.q_proj": (torch.zeros(2, 32), torch.zeros(48, 3))}),
    "no such layer": ({}, {"layers.0.self_attn.w_proj": (torch.zeros(2, 32), torch.zeros(48, 2))}),
    "this model has 2 layers": ({}, {"layers.7.self_attn.q_proj": (torch.zeros(2, 32), torch.zeros(48, 2))}),
    "no LoRA factor": ({}, {"embed_tokens": (torch.zeros(2, 32), torch.zeros(67, 2))}),
    "matrices of floats": ({}, {"layers.0.self_attn.q_proj": (torch.zeros(2, 32, dtype=torch.int8), torch.zeros(48, 2))}),
    "no finite numbers": ({}, {"layers.0.self_attn.q_proj": (torch.full((2, 32), float("inf")), torch.zeros(48, 2))}),
    "all adapters together have 1,000,000": ({}, {"layers.0.self_attn.q_proj": (torch.zeros(4000, 32), torch.zeros(48, 4000))}),
}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_files_end_in_words_and_the_engine_goes_on(text, tmp_path):
    how, factors = HOSTILE[text]
    decoder = build(DENSE)
    write(tmp_path / "voice", factors or random_factors(DENSE, 1), **how)
    engine = engine_of(decoder, tmp_path, adapter_bytes=1_000_000)
    with pytest.raises(RequestError, match=text) as caught:
        engine.submit(ask(1, [4, 5], "voice"))
    assert caught.value.field == "model"
    assert str(tmp_path) not in str(caught.value), "clients learn no path"
    assert engine.idle
    assert serve(engine, [ask(2, [4, 5])])["2"][0] == naive(decoder, [4, 5], 6)


def test_broken_folders_end_in_words(tmp_path):
    engine = engine_of(build(DENSE), tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "half", random_factors(DENSE, 1))
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    write(tmp_path / "torn", random_factors(DENSE, 1))
    with (tmp_path / "torn" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(400)
    write(tmp_path / "lone", {})
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}, tmp_path / "lone" / "x.safetensors")
    (tmp_path / "lone" / "x.safetensors").rename(tmp_path / "lone" / "adapter_model.safetensors")
    write(tmp_path / "text", random_factors(DENSE, 1))
    (tmp_path / "text" / "adapter_config.json").write_text("[" * 100_000)
    said = {"empty": "no adapter 'empty'", "half": "cannot be read", "torn": "torn", "lone": "not its counterpart", "text": "not JSON"}
    for name, text in said.items():
        with pytest.raises(RequestError, match=text):
            engine.submit(ask(1, [4, 5], name))
    assert engine.idle


def test_names_are_words_and_never_paths(tmp_path):
    write(tmp_path / "outside", random_factors(DENSE, 1))
    write(tmp_path / "inside" / "voice", random_factors(DENSE, 1))
    write(tmp_path / "inside" / "odd name", random_factors(DENSE, 1))
    (tmp_path / "inside" / "file").write_text("no adapter")
    folder = AdapterFolder(tmp_path / "inside")
    assert folder.names() == ["voice"]
    for name in ("../outside", "..", ".", "", "voice/", "voice/../../outside", str(tmp_path / "outside"), "odd name", "a" * 200, "vo\0ice"):
        with pytest.raises(RequestError, match="no adapter"):
            folder.find(name)
    with pytest.raises(ConfigError, match="is no folder"):
        AdapterFolder(tmp_path / "nowhere")


def test_an_engine_without_adapters_says_so():
    with pytest.raises(RequestError, match="without adapters"):
        Engine(build(DENSE)).submit(ask(1, [4, 5], "voice"))
