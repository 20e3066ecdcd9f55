"""Stages of learning to see: what is frozen stays to the bit; each modality's routers have losses, load and bias of their own."""

import pytest
import torch
from torch.nn import functional as F

from ernie45.errors import ConfigError
from ernie45.nn.attention import PackedCausal
from ernie45.ops import Routing
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, pack
from ernie45.train.optim import Optimiser, OptimiserConfig, matrix_rows
from ernie45.train.router_losses import RouterWatch, load_balance_loss, orthogonal_loss, z_loss
from ernie45.train.stages import choose_learning
from ernie45.train.step import LossConfig, Step
from tests.parallel.facts import Keep
from tests.sighted import VISION, noise, noise_batch, sighted_decoder
from tests.train.conftest import make_decoder

RATE = 2.0**-6
"""A power of two: biases move by exactly so much."""


def seeing(seed=1):
    return noise_batch((5, noise(2, 3, seed), 7, 8, 9), (4, 6, 3, 11), (9, noise(1, 2, seed + 1), 3))


def words():
    return pack([Example((4, 6, 3, 11), (IGNORED, 6, 3, 11))])


def weights(decoder):
    return {name: p.detach().clone() for name, p in decoder.named_parameters()}


def moved(before, decoder):
    return {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}


IN = {
    "text": lambda name: not name.startswith("sight.") and ".vision." not in name,
    "sight": lambda name: name.startswith("sight."),
    "vision": lambda name: name.startswith("sight.") or ".vision." in name,
    "joint": lambda name: True,
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stage", IN)
def test_a_stage_moves_what_it_names_and_nothing_else(stage, kind):
    decoder = sighted_decoder()
    choose_learning(decoder, stage)
    before = weights(decoder)
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(kind=kind), 32), LossConfig(balance=0.01, orthogonal=0.01, bias_rate=RATE))
    batches = [words()] if stage == "text" else [seeing()]
    for number in range(2):
        report = step(batches, number, 1e-3)
    assert report.norm > 0
    learning = {name for name in before if IN[stage](name)}
    changed = moved(before, decoder)
    assert changed <= learning
    # experts that no token chose keep their matrices, but a stack moves as one
    assert learning - changed <= {name for name in learning if name.endswith("selection_bias")}
    assert any(name.endswith("selection_bias") for name in changed) == (stage != "sight")


def test_what_is_frozen_by_name_stays():
    decoder = sighted_decoder()
    choose_learning(decoder, "vision", ("sight.tower.*", "*.vision.router.*"))
    before = weights(decoder)
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig(bias_rate=RATE))
    step([seeing()], 0, 1e-3)
    changed = moved(before, decoder)
    assert {name.split(".")[1] for name in changed if name.startswith("sight.")} == {"resampler"}
    assert {name.rpartition(".vision.")[2] for name in changed if ".vision." in name} == {"experts.gate_up", "experts.down"}


def test_a_step_without_pictures_teaches_what_sees_nothing():
    decoder = sighted_decoder()
    choose_learning(decoder, "vision")
    before = weights(decoder)
    report = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())([words()], 0, 1e-3)
    assert (report.norm, report.skipped, moved(before, decoder)) == (0.0, False, set())
    both = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())([words(), seeing()], 0, 1e-3)
    assert both.norm > 0
    assert both.text_loss is not None


def test_stages_are_for_models_that_have_them():
    with pytest.raises(ConfigError, match="stage vision teaches a model to see, and this one reads text alone"):
        choose_learning(make_decoder(), "vision")
    with pytest.raises(ConfigError, match=r"freeze: no weight of the model is named 'embd\.weight'; did you mean 'embed\.weight'"):
        choose_learning(make_decoder(), "joint", ("embd.weight",))
    with pytest.raises(ConfigError, match="nothing is left to learn: stage sight without sight"):
        choose_learning(sighted_decoder(), "sight", ("sight.*",))


def test_each_modality_has_its_own_router_losses():
    """What the report says is what the formulas give for the tokens of one modality, layer by layer; both kinds add gradient."""
    decoder, seen = sighted_decoder(), seeing()
    routers = {"": [], "vision_": []}

    def note(router, inputs, output):
        logits_TE = F.linear(inputs[0].float(), router.weight)
        bank = "vision_" if any(router is layer.ffn.vision.router for layer in decoder.layers if hasattr(layer.ffn, "vision")) else ""
        routers[bank].append((logits_TE.detach(), output.experts, router))

    hooks = [part.register_forward_hook(note) for part in decoder.modules() if type(part).__name__ == "Router"]
    optimiser = Keep(decoder, OptimiserConfig(), 32)
    report = Step(decoder, optimiser, LossConfig(balance=0.1, z=0.1, orthogonal=0.1))([seen, words()], 0, 1e-3)
    for hook in hooks:
        hook.remove()
    text, vision = routers[""], routers["vision_"]
    layers = len(vision)
    assert layers == 3
    assert len(text) == 6
    balance = [load_balance_loss(logits, 2).item() for logits, _, _ in vision]
    assert report.vision_balance_loss == pytest.approx(sum(balance) / layers, rel=1e-6), "over the one batch that has pictures"
    assert report.vision_z_loss == pytest.approx(sum(z_loss(logits).item() for logits, _, _ in vision) / layers, rel=1e-6)
    assert report.vision_orthogonal_loss == pytest.approx(sum(orthogonal_loss(r.weight).item() for _, _, r in vision) / layers, rel=1e-6)
    assert report.balance_loss == pytest.approx(sum(load_balance_loss(logits, 2).item() for logits, _, _ in text) / 6, rel=1e-6)
    assert [len(logits) for logits, _, _ in vision] == [report.vision_tokens] * layers
    counts = [torch.bincount(experts.flatten(), minlength=8) for _, experts, _ in vision]
    assert report.vision_load == tuple(tuple(round(v, 3) for v in (c / c.double().mean()).tolist()) for c in counts)
    plain = Keep(decoder, OptimiserConfig(), 32)
    again = Step(decoder, plain, LossConfig())([seen, words()], 0, 1e-3)
    assert again.loss == report.loss, "router losses leave the logged loss alone"
    assert all(not torch.equal(optimiser.grads[name], grad) for name, grad in plain.grads.items() if name.endswith("router.weight"))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_bias_of_each_modality_moves_once_a_step(recompute):
    """By the load of its own tokens over all micro-batches, however often a layer is computed."""
    decoder = sighted_decoder()
    loads = {name: torch.zeros(8) for name, _ in decoder.named_parameters() if name.endswith("selection_bias")}
    names = {id(part): f"{name}.selection_bias" for name, part in decoder.named_modules() if type(part).__name__ == "Router"}
    with torch.no_grad():  # the choices of the same weights, counted by another road
        watch = RouterWatch(decoder, want_logits=False)

        def count(router, inputs, output: Routing):
            loads[names[id(router)]] += torch.bincount(output.experts.flatten(), minlength=8)

        hooks = [part.register_forward_hook(count) for part in watch.routers]
        for one in (seeing(1), seeing(5), words()):
            x_TD = decoder.embed(one.tokens_T)
            if one.seen is not None:
                x_TD = decoder.sight.put(x_TD, one.tokens_T, decoder.sight(one.seen.patches_SC, one.seen.grids))
            decoder(x_TD, one.positions_T, PackedCausal(list(one.doc_ends)), None if one.seen is None else one.seen.vision_T)
        for hook in hooks:
            hook.remove()
        watch.close()
    before = weights(decoder)
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig(bias_rate=RATE), recompute=recompute)
    step([seeing(1), seeing(5), words()], 0, 1e-3)
    for name, load in loads.items():
        wanted = before[name] + RATE * (load.mean() - load).sign()
        assert torch.equal(dict(decoder.named_parameters())[name], wanted), name
    assert len(loads) == 6


def test_token_balanced_loss_against_its_formula_in_float64():
    """Gradients of sum over labels of cross entropy / (labels + other tokens); the reported loss stays the mean per label.

    The twin takes the decoder's logits to float64 and lets autograd through the plain formula.
    """
    decoder, batches = sighted_decoder(), [seeing(), words(), seeing(4)]
    optimiser = Keep(decoder, OptimiserConfig(), 32)
    report = Step(decoder, optimiser, LossConfig(token_balanced=True))(batches, 0, 1e-3)
    twin = sighted_decoder()
    tokens, total, labels = sum(one.num_tokens for one in batches), 0.0, 0
    for one in batches:
        x_TD = twin.embed(one.tokens_T)
        vision_T = None
        if one.seen is not None:
            x_TD = twin.sight.put(x_TD, one.tokens_T, twin.sight(one.seen.patches_SC, one.seen.grids))
            vision_T = one.seen.vision_T
        h_TD = twin(x_TD, one.positions_T, PackedCausal(list(one.doc_ends)), vision_T)
        loss = F.cross_entropy(twin.logits(h_TD).double(), one.labels_T, ignore_index=IGNORED, reduction="sum")
        (loss / tokens).backward()
        total, labels = total + loss.item(), labels + one.learned
    assert report.loss == pytest.approx(total / labels, abs=1e-5)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and name in optimiser.grads:
            # float32 below the logits, in other chunks
            torch.testing.assert_close(optimiser.grads[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert len(optimiser.grads) > 60


def test_rates_of_routers_and_tower_on_every_layer():
    decoder = sighted_decoder()
    optimiser = Optimiser(decoder, OptimiserConfig(router_rate=0.01, tower_rate=0.5, weight_decay=0.0), 32)
    rates = {name: optimiser._rate(name, 1.0) for name in optimiser.parameters}
    routers = {name for name in rates if name.endswith("router.weight")}
    assert len(routers) == 6
    assert all(rates[name] == 0.01 for name in routers)
    assert {name.split(".")[1] for name, rate in rates.items() if rate == 0.5} == {"tower"}
    assert all(rate == 1.0 for name, rate in rates.items() if name not in routers and ".tower." not in name)
    before = weights(decoder)
    Step(decoder, optimiser, LossConfig())([seeing()], 0, 1e-3)
    # AdamW's first step is the rate in every number that has a gradient
    for name in routers:
        largest = (dict(decoder.named_parameters())[name] - before[name]).abs().max().item()
        assert largest == pytest.approx(1e-5, rel=0.05), name


def test_muon_turns_each_head_of_the_tower_by_itself():
    decoder = sighted_decoder()
    optimiser = Optimiser(decoder, OptimiserConfig(kind="muon"), decoder.config.head_size)
    name = "sight.tower.blocks.0.attn.qkv.weight"
    assert optimiser._tower_heads[name] == VISION.head_size != decoder.config.head_size
    assert matrix_rows(name, (96, 32), optimiser._tower_heads[name]) == VISION.head_size
    assert "sight.tower.patches.weight" not in optimiser._muon
    assert "layers.1.ffn.vision.experts.gate_up" in optimiser._muon
