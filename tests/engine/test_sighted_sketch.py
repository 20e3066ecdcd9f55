"""A packed model that sees finds its best tokens by half a head too, and never says what stands for a picture."""

from dataclasses import replace

import pytest
import torch

from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import Request, SamplingParams
from ernie45.nn.moe import Router
from ernie45.ops.network import Network
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule
from tests.sighted import RULES, VISION, expected, noise, placed, sighted_decoder

PROMPTS = [(5, 6, 7), (8, noise(2, 3), 9), (300, 20, 100, 4), (11, noise(1, 1, 3), 12, 13)]
RULES_OF_PACKING = (
    Rule(pattern="sight.tower.patches", scheme=None),
    Rule(pattern="sight.*", scheme="w8a8"),
    Rule(pattern="*", scheme="w8a8-g32"),
)


def packed(dtype, **more):
    """More placeholders than one as it likes: the weights stay the same."""
    decoder = sighted_decoder(vision=replace(VISION, expert_size=32, **more)).to(dtype)
    for part in decoder.modules():
        if isinstance(part, Router):
            part.float()
    quantise_model(decoder, QuantSpec(rules=RULES_OF_PACKING))
    return decoder


def answers(decoder, prompts, count=6):
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=256, max_length=256), rules=RULES)
    for number, parts in enumerate(prompts):
        ids, pictures = placed(*parts)
        engine.submit(Request(id=str(number), prompt=ids, params=SamplingParams(temperature=0, max_tokens=count), pictures=pictures))
    said = {}
    while not engine.idle:
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(output.tokens)
    return [tuple(said[str(number)]) for number in range(len(prompts))]


@pytest.fixture
def steps(monkeypatch):
    """Runs with the sketch as asked for, or without it; what each native step returned is kept."""
    real = Network.step

    class Steps:
        sketch, results = True, []

        def run(self, sketch, *asked):
            self.sketch, self.results = sketch, []
            return answers(*asked)

    kept = Steps()

    def step(network, *places):
        done = real(network, *places[:-1], places[-1] and kept.sketch)
        kept.results.append(done)
        return done

    monkeypatch.setattr(Network, "step", step)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("barred", [False, True], ids=["all may be said", "the best is a placeholder"])
def test_answers_are_those_of_all_logits(steps, dtype, barred):
    decoder, prompts = packed(dtype), PROMPTS
    if barred:  # what would be said last, when every picture is read, becomes what stands for a video
        decoder = packed(dtype, video_id=steps.run(False, decoder, prompts)[0][-1])
    whole = steps.run(False, decoder, prompts)
    assert all(done.logits_RV is not None for done in steps.results)
    said = steps.run(True, decoder, prompts)
    assert any(done.logits_RV is None for done in steps.results), "the head was half read"
    assert said == whole
    placeholders = decoder.sight.config.placeholder_ids
    found = {token for done in steps.results if done.logits_RV is None for token in done.best_R.tolist()}
    assert bool(found & placeholders) == barred
    assert not placeholders & {token for answer in said for token in answer}
    if dtype == torch.float32:
        assert said == [expected(decoder, *placed(*parts), 6) for parts in prompts]
