"""Learning from pictures against transformers: the same loss, and the same gradient of every weight of either half.

Tolerance: float32, gradients of size up to 1; the two sum in different orders, and tower, resampler and layers add about one rounding each.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import Ernie4_5_VLMoeForConditionalGeneration

from ernie45.models.load import load
from ernie45.models.save import save_model
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, Seen, pack
from ernie45.train.optim import OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.parallel.facts import Keep
from tests.parity.sighted import CASES, IMAGE, VIDEO, prompt, reference, their_inputs

NAMES = ["one image", "images of different sizes", "image, video and text"]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case's name, transformers' model, and ours loaded from the folder it wrote, with transformers' rule of positions."""
    model, folder = reference(request.param), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    decoder = load(folder, dtype="float32", positions="transformers").decoder
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(not name.endswith("selection_bias"))
    return request.param, model, decoder


def labels_of(tokens):
    """Every word is learned but the first; pictures and their markers are not."""
    return [IGNORED if IMAGE <= token <= VIDEO or place == 0 else token for place, token in enumerate(tokens)]


def batch_of(decoder, prompts):
    """Several prompts as one packed batch."""
    batch = pack([Example(tuple(p.tokens), tuple(labels_of(p.tokens))) for p in prompts])
    pixels = [one for p in prompts for one in p.pixels]
    places = [decoder.sight.positions(p.tokens, [grid for _, grid in p.pixels]).positions_T3 for p in prompts]
    seen = Seen(torch.cat([patches for patches, _ in pixels]), tuple(g for _, g in pixels), decoder.sight.is_vision(batch.tokens_T), b"")
    return replace(batch, positions_T=torch.cat(places), seen=seen)


def our_step(decoder, batch, **how):
    optimiser = Keep(decoder, OptimiserConfig(), decoder.config.head_size)
    step = Step(decoder, optimiser, LossConfig(mtp=0.0), **how)
    report = step([batch], 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads


def as_theirs(case, decoder, grads, folder):
    """Our gradients under transformers' names: written as if they were weights, and read by transformers."""
    held = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.copy_(grads.get(name, torch.zeros_like(parameter)))
        save_model(decoder, folder)
    finally:
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.copy_(held[name])
    return dict(Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).named_parameters())


def assert_same_gradients(theirs, model):
    seen = {"vision_tower": 0, "resampler": 0, "text_moe": 0, "vision_moe": 0}
    if model.config.text_config.moe_k > 1:  # the weight of a single expert is 1, whatever its router says
        seen["gate.weight"] = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert not theirs[name].any(), name
            continue
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(theirs[name], parameter.grad, atol=2e-5 * max(1.0, scale), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for part in seen:
            seen[part] += part in name and scale > 1e-4
    assert all(seen.values()), seen


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(pair, name, tmp_path):
    case, model, decoder = pair
    found = prompt(case, name)
    model.zero_grad(set_to_none=True)
    model.model.rope_deltas = None
    theirs = model(**their_inputs(found), labels=torch.tensor([labels_of(found.tokens)])).loss
    theirs.backward()
    report, grads = our_step(decoder, batch_of(decoder, [found]))
    assert report.loss == pytest.approx(theirs.item(), abs=1e-5)
    assert_same_gradients(as_theirs(case, decoder, grads, tmp_path / "grads"), model)


def test_rows_packed_together_are_as_one_by_one(pair, tmp_path):
    """One row of text, and three with pictures: their loss is the mean over all labels, and none of them sees another's picture."""
    case, model, decoder = pair
    prompts = [prompt(case, name) for name in ("one image", "no image", "images of different sizes", "video")]
    model.zero_grad(set_to_none=True)
    count = sum(label != IGNORED for p in prompts for label in labels_of(p.tokens))
    total = 0.0
    for found in prompts:
        model.model.rope_deltas = None
        logits_TV = model(**their_inputs(found)).logits[0]
        loss = F.cross_entropy(logits_TV[:-1], torch.tensor(labels_of(found.tokens)[1:]), reduction="sum") / count
        loss.backward()
        total += loss.item()
    report, grads = our_step(decoder, batch_of(decoder, prompts))
    assert report.loss == pytest.approx(total, abs=1e-5)
    assert_same_gradients(as_theirs(case, decoder, grads, tmp_path / "grads"), model)
    again, same = our_step(decoder, batch_of(decoder, prompts), recompute=True)
    assert again.loss == report.loss
    assert all(torch.equal(same[name], grad) for name, grad in grads.items())
