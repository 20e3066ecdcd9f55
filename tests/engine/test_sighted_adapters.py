"""Pictures with adapters, with fewer bits in the cache and in the weights: the answers are those of whole passes without any of it."""

from dataclasses import replace

import pytest

from ernie45.engine import eyes
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import Request, SamplingParams
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.models.vision_pieces import encode_in_pieces
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule
from tests.engine.peft_adapters import merged, random_factors, write
from tests.sighted import RULES, VISION, expected, noise, placed, sighted_decoder

WAYS = {"all": lambda target: True, "attention": lambda target: "self_attn" in target, "experts": lambda target: ".experts." in target}
PROMPTS = [(1, noise(2, 3, 1), 2), (5, 6, 7), (noise(1, 2, 2), 3, noise(2, 2, 3, frames=4), 4), (9, noise(3, 3, 4), 8)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A decoder that sees, the folder of its adapters, and the merged decoder of each."""
    root, decoder = tmp_path_factory.mktemp("adapters"), sighted_decoder()
    whole = {"": decoder}
    for seed, (name, keep) in enumerate(WAYS.items()):
        factors = random_factors(decoder.config, seed, 2, keep, size=0.3, vision=VISION)
        write(root / name, factors, rank=2, alpha=4.0)
        whole[name] = merged(sighted_decoder(), factors, 2.0)
    return decoder, root, whole


def engine_of(decoder, root=None, **how):
    config = EngineConfig(**({"page_size": 4, "num_pages": 256, "max_length": 256} | how))
    return Engine(decoder, config, adapters=None if root is None else AdapterFolder(root), rules=RULES)


def ask(name, parts, count=5, adapter=""):
    ids, pictures = placed(*parts)
    return Request(id=name, prompt=ids, params=SamplingParams(temperature=0, max_tokens=count), pictures=pictures, adapter=adapter)


def answers(engine, requests, pauses=0):
    said = {request.id: () for request in requests}

    def step():
        for output in engine.step():
            said[output.request_id] += output.tokens

    for request in requests:
        engine.submit(request)
        for _ in range(pauses):
            step()
    while not engine.idle:
        step()
    engine.verify()
    return said


@pytest.mark.parametrize("budget", [3, 8, 200])
@pytest.mark.parametrize("pauses", [0, 3])
def test_each_request_is_answered_by_its_merged_model(family, budget, pauses):
    """Rows of text and of pictures, of all adapters and of none, in the same steps; chunks end inside pictures."""
    decoder, root, whole = family
    requests = [ask(f"{name} {n}", parts, adapter=name) for n, parts in enumerate(PROMPTS) for name in whole]
    said = answers(engine_of(decoder, root, token_budget=budget, num_pages=400), requests, pauses)
    for request in requests:
        assert said[request.id] == expected(whole[request.adapter], request.prompt, request.pictures, 5), request.id


def test_adapters_change_what_is_said_of_a_picture(family):
    decoder, root, whole = family
    requests = [ask(name, PROMPTS[0], 8, adapter=name) for name in whole]
    assert len(set(answers(engine_of(decoder, root), requests).values())) > 1


def test_pages_of_one_picture_are_not_shared_between_adapters(family):
    """The same prompt again: found in the cache under the same adapter, and computed anew under another."""
    decoder, root, whole = family
    engine = engine_of(decoder, root)
    for _ in range(2):
        for name in ("all", "", "experts"):
            request = ask(f"{name} once", PROMPTS[3], adapter=name)
            assert answers(engine, [request])[request.id] == expected(whole[name], request.prompt, request.pictures, 5)


def test_packed_weights_with_adapters_and_pictures_answer_as_their_own_whole_passes(tmp_path):
    """The bare rows of a mixed step: those of the packed network alone, in blocks that are taken apart for the adapters beside them."""
    vision = replace(VISION, expert_size=32)
    packed = sighted_decoder(vision=vision)
    write(tmp_path / "all", random_factors(packed.config, 0, vision=vision))
    rules = (Rule(pattern="sight.tower.patches", scheme=None), Rule(pattern="sight.*", scheme="w8a8"), Rule(pattern="*", scheme="w8a8-g32"))
    quantise_model(packed, QuantSpec(rules=rules))
    requests = [ask(f"{n}", parts, 3, adapter="all" if n % 2 else "") for n, parts in enumerate(PROMPTS)]
    said = answers(engine_of(packed, tmp_path), requests)
    for request in requests[::2]:
        assert said[request.id] == expected(packed, request.prompt, request.pictures, 3)
    assert all(len(said[request.id]) == 3 for request in requests)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_pictures_in_a_packed_cache(kv):
    """A packed cache rounds, so answers may differ from the whole pass; chunks, neighbours and sharing must not change them."""
    decoder = sighted_decoder()
    requests = [ask(f"{n}", parts) for n, parts in enumerate(PROMPTS)]
    engines = [engine_of(decoder, kv=kv, token_budget=budget, page_size=4) for budget in (200, 200)]
    together = answers(engines[0], requests)
    alone = {request.id: answers(engines[1], [request])[request.id] for request in requests}
    assert together == alone
    same = sum(together[r.id][:1] == expected(decoder, r.prompt, r.pictures, 1) for r in requests)
    assert same >= (len(requests) if kv == "int8" else 1), "the first token of nearly every answer is that of the whole pass"


def test_a_picture_in_use_is_encoded_once_however_little_room_there_is(monkeypatch):
    """Features stay until their request is over, also when the sequence is preempted and computed again through its pictures."""
    counted = []

    def counting(sight, patches_SC, grid):
        counted.append(grid)
        return (yield from encode_in_pieces(sight, patches_SC, grid))

    monkeypatch.setattr(eyes, "encode_in_pieces", counting)
    decoder = sighted_decoder()
    engine = engine_of(decoder, picture_bytes=1, page_size=4, num_pages=9, max_length=36, token_budget=4, prefix_sharing=False)
    requests = [ask("a", (1, noise(2, 3, 1), 2), 12), ask("b", (3, noise(2, 3, 2), 4), 12)]
    said = answers(engine, requests)
    assert said == {r.id: expected(decoder, r.prompt, r.pictures, 12) for r in requests}
    assert len(counted) == 2
