"""Pictures in the engine: whatever the chunks, pages, neighbours and evictions, the answer is that of whole passes without a cache."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine import eyes
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import FinishReason, PlacedPicture, Request, SamplingParams
from ernie45.errors import ConfigError, RequestError
from ernie45.models.vision_pieces import encode_in_pieces
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import PixelRules
from tests.sighted import RULES, SEEN, START, VISION, expected, noise, placed, sighted_decoder


@pytest.fixture(scope="module")
def decoder():
    return sighted_decoder()


def engine_of(decoder, **settings):
    return Engine(decoder, EngineConfig(**({"page_size": 4, "num_pages": 256, "max_length": 256} | settings)), rules=RULES)


def asked(name, *parts, count=4, **more):
    ids, pictures = placed(*parts)
    return Request(id=name, prompt=ids, params=SamplingParams(temperature=0, max_tokens=count), pictures=pictures, **more)


def run(engine, limit=10_000):
    """Steps until idle: tokens, cached tokens and finish of each request."""
    said, cached, finish = {}, {}, {}
    for _ in range(limit):
        if engine.idle:
            break
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(output.tokens)
            cached[output.request_id] = output.cached_tokens
            finish[output.request_id] = output.finish
    assert engine.idle
    engine.verify()
    return {name: tuple(tokens) for name, tokens in said.items()}, cached, finish


def answers(engine, *requests):
    for request in requests:
        engine.submit(request)
    return run(engine)[0]


@pytest.mark.parametrize("rows", [1, 4, 7, 16, 1000])
@pytest.mark.parametrize("picture", [noise(1, 1), noise(3, 5), noise(2, 2, frames=2), noise(1, 3, frames=6)], ids=lambda p: str(p.grid))
def test_pieces_give_what_the_whole_gives(decoder, picture, rows):
    pixels = torch.from_numpy(patches(picture, RULES))
    pieces = encode_in_pieces(decoder.sight, pixels, picture.grid, rows)
    costs = []
    with torch.inference_mode():
        while True:
            try:
                costs.append(next(pieces))
            except StopIteration as done:
                found = done.value
                break
        # the same products over fewer rows, added in another order
        torch.testing.assert_close(found, decoder.sight.encode(pixels, picture.grid), rtol=0, atol=1e-5)
    assert all(cost > 0 for cost in costs)
    assert len(costs) >= VISION.depth


PICTURES = [noise(1, 1), noise(2, 3, 1), noise(2, 3, 2), noise(4, 3, 3), noise(2, 2, 4, frames=4)]


@st.composite
def prompts(draw):
    word, picture = st.integers(0, 499), st.sampled_from(PICTURES)
    parts = draw(st.lists(st.one_of(word, word, picture), min_size=1, max_size=8))
    return [*parts, draw(word)]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(prompts(), st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4),
    st.sampled_from([3, 8, 64]),
    st.sampled_from([1, 4, 7]),
    st.integers(0, 40),
    st.booleans(),
)
def test_chunks_pages_preemption_and_neighbours_do_not_change_answers(decoder, wanted, budget, page_size, spare, sharing):
    """Few pages: sequences are preempted, and computed again through their pictures."""
    requests = [asked(str(n), *parts, count=count) for n, (parts, count, _) in enumerate(wanted)]
    longest = max(len(request.prompt) + 6 for request in requests)
    pages = -(-longest // page_size) + spare // page_size
    engine = engine_of(decoder, page_size=page_size, num_pages=pages, max_length=longest, token_budget=budget, prefix_sharing=sharing)
    said: dict[str, tuple[int, ...]] = {}
    for request, (_, _, pause) in zip(requests, wanted, strict=True):
        engine.submit(request)
        for _ in range(pause):
            for output in engine.step():
                said[output.request_id] = said.get(output.request_id, ()) + output.tokens
    for name, tokens in run(engine)[0].items():
        said[name] = said.get(name, ()) + tokens
    for request in requests:
        assert said[request.id] == expected(decoder, request.prompt, request.pictures, request.params.max_tokens)


def test_pictures_and_their_order_matter(decoder):
    one, other = noise(2, 3, 1), noise(2, 3, 2)
    said = answers(engine_of(decoder), asked("a", 1, one, other, 7), asked("b", 1, other, one, 7), asked("c", 1, one, one, 7))
    assert len(set(said.values())) == 3


def test_pages_are_shared_by_picture_and_not_by_placeholder(decoder):
    engine = engine_of(decoder)
    engine.submit(asked("first", 1, 2, 3, noise(4, 4, 1), 7, 8, 9))
    run(engine)
    engine.submit(asked("same", 1, 2, 3, noise(4, 4, 1), 7, 8, 9))
    engine.submit(asked("other", 1, 2, 3, noise(4, 4, 2), 7, 8, 9))
    said, cached, _ = run(engine)
    assert cached == {"same": 20, "other": 4}  # of 23 tokens; the other one shares the page in front of its picture
    assert said["same"] == expected(decoder, *placed(1, 2, 3, noise(4, 4, 1), 7, 8, 9), 4)
    assert said["other"] == expected(decoder, *placed(1, 2, 3, noise(4, 4, 2), 7, 8, 9), 4)
    assert said["same"] != said["other"]


def test_a_picture_is_encoded_once(decoder, monkeypatch):
    engine = engine_of(decoder)
    made = []
    real = engine._eyes._encoding
    monkeypatch.setattr(engine._eyes, "_encoding", lambda picture: made.append(picture) or real(picture))
    picture = noise(3, 3)
    answers(engine, *(asked(str(n), n, picture, picture) for n in range(3)))
    answers(engine, asked("later", 9, picture, 4))
    assert len(made) == 1


def test_encoded_pictures_have_a_bound(decoder):
    per_token = 64 * 4
    engine = engine_of(decoder, picture_bytes=20 * per_token)
    for seed in range(6):
        answers(engine, asked("x", 1, noise(3, 3, seed), 2))
        assert engine._eyes._size() <= 20 * per_token
    assert len(engine._eyes._features) == 2
    answers(engine, asked("large", 1, noise(5, 5), 2))  # alone it may have what it needs
    assert engine._eyes._size() <= 20 * per_token


def test_requests_whose_pictures_have_no_room_wait_for_it(decoder):
    engine = engine_of(decoder, picture_bytes=20 * 64 * 4)
    requests = [asked(str(n), 1, noise(3, 4, n), 2, count=3) for n in range(4)]
    said = answers(engine, *requests)
    assert said == {r.id: expected(decoder, r.prompt, r.pictures, 3) for r in requests}


def test_answers_go_on_while_a_large_picture_is_encoded(decoder, monkeypatch):
    """Each step brings the running answer its token, however large the picture that another request brings."""
    monkeypatch.setattr(eyes, "encode_in_pieces", partial(encode_in_pieces, rows=32))
    engine = engine_of(decoder, max_length=512, num_pages=512)
    engine._vision_budget = 1  # a piece a step
    engine.submit(asked("writing", 1, 2, count=100))
    engine.step()
    engine.submit(asked("seeing", 3, noise(8, 8), 4, count=2))
    assert engine.load.waiting == 1
    steps = []
    while engine.load.waiting:
        steps.append([output.request_id for output in engine.step()])
    # 256 patches: 8 pieces are read, 2 x 8 in each of two blocks, 8 joined; the last step also reads the prompt
    assert len(steps) == 8 + 32 + 8 + 1
    assert steps[:-1] == [["writing"]] * 48
    assert steps[-1] == ["writing", "seeing"]
    assert run(engine)[0]["seeing"] == expected(decoder, *placed(3, noise(8, 8), 4), 2)[1:]


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_cancelling_frees_whatever_a_request_has(decoder, steps):
    engine = engine_of(decoder, token_budget=8)
    engine._vision_budget = 1
    engine.submit(asked("writing", 1, 2, count=100))
    engine.step()
    engine.submit(asked("gone", 3, noise(4, 4), 4, count=3))
    engine.submit(asked("stays", 3, noise(4, 4), 4, count=3))
    said = ()
    for _ in range(steps):
        for output in engine.step():
            said += output.tokens if output.request_id == "stays" else ()
    engine.cancel("gone")
    engine.cancel("writing")
    engine.verify()
    found, _, _ = run(engine)
    assert said + found.get("stays", ()) == expected(decoder, *placed(3, noise(4, 4), 4), 3)
    assert not engine._eyes._holders
    assert not engine._eyes._seen


def test_a_broken_encoder_ends_its_requests_and_no_other(decoder, monkeypatch):
    engine = engine_of(decoder)

    def broken(picture):
        raise MemoryError("no room")
        yield

    monkeypatch.setattr(engine._eyes, "_encoding", broken)
    engine.submit(asked("text", 1, 2, 3))
    engine.submit(asked("seeing", 3, noise(2, 2), 4))
    with pytest.raises(MemoryError):
        engine.step()
    said, _, finish = run(engine)
    assert finish["seeing"] is FinishReason.error
    assert said["text"] == expected(decoder, (1, 2, 3), (), 4)
    assert not engine._eyes._holders


def test_a_placeholder_is_never_said(decoder):
    params = SamplingParams(temperature=0, max_tokens=3, logit_bias={SEEN: 100.0})
    engine = engine_of(decoder)
    engine.submit(Request(id="x", prompt=(1, 2, 3), params=params))
    assert SEEN not in run(engine)[0]["x"]


def test_markers_in_a_prompt_go_where_the_model_takes_them(decoder):
    ids = (1, START, 2, 3)
    engine = engine_of(decoder)
    engine.submit(Request(id="x", prompt=ids, params=SamplingParams(temperature=0, max_tokens=4)))
    assert run(engine)[0]["x"] == expected(decoder, ids, (), 4)


def test_prompt_logprobs_reach_through_pictures(decoder):
    ids, pictures = placed(1, noise(2, 2), 5, 6)
    engine = engine_of(decoder, token_budget=3)
    engine.submit(Request(id="x", prompt=ids, pictures=pictures, params=SamplingParams(max_tokens=1, prompt_logprobs=0)))
    found = []
    while not engine.idle:
        for output in engine.step():
            found += output.prompt_logprobs
    pixels = [(torch.from_numpy(patches(p.picture, RULES)), p.picture.grid) for p in pictures]
    wanted = decoder.prompt_logits(ids, pixels).log_softmax(-1)
    assert [entry.token for entry in found] == list(ids[1:])
    for place, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(wanted[place, ids[place + 1]]), abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "pictures", "says"),
    [
        ((1, SEEN, SEEN, 2), (), "stands for a picture, and there are only 0"),
        ((1, 2), (PlacedPicture(1, noise(1, 1)),), "has placeholders for 0"),
        ((1, SEEN, 2), (PlacedPicture(1, noise(2, 2)),), "takes 4 placeholder tokens"),
        ((1, SEEN, 2), (PlacedPicture(2, noise(1, 1)),), "is said to stand at 2; its placeholders begin at 1"),
    ],
)
def test_pictures_that_do_not_meet_their_places_are_refused(decoder, ids, pictures, says):
    with pytest.raises(RequestError, match=says):
        engine_of(decoder).submit(Request(id="x", prompt=ids, pictures=pictures))


def test_pictures_cut_for_another_model_are_refused(decoder):
    from ernie45.tokens.pictures import Picture

    other = Picture("image", 1, 28, 28, bytes(28 * 28 * 3))
    with pytest.raises(RequestError, match="rules of another model"):
        engine_of(decoder).submit(Request(id="x", prompt=(SEEN,), pictures=(PlacedPicture(0, other),)))
    with pytest.raises(ConfigError, match="cut patches of 14 pixels"):
        Engine(decoder, EngineConfig(num_pages=8, max_length=64), rules=PixelRules())


def test_a_model_without_eyes_refuses_pictures():
    from ernie45.models.released import tiny
    from ernie45.models.text import Decoder

    blind = Decoder(tiny()).initialise(torch.Generator().manual_seed(0)).eval()
    with pytest.raises(RequestError, match="sees no pictures"):
        Engine(blind, EngineConfig(num_pages=8, max_length=64)).submit(asked("x", 1, noise(1, 1)))


def test_an_id_lives_once_while_its_pictures_are_encoded(decoder):
    engine = engine_of(decoder)
    engine.submit(asked("x", 1, noise(2, 2)))
    with pytest.raises(RequestError, match="already alive"):
        engine.submit(asked("x", 1, noise(2, 2)))
    run(engine)


def test_requests_with_pictures_cross_a_process_border():
    from ernie45.engine.wire import Submit, ToEngine, Unpacker, pack

    request = asked("x", 1, noise(2, 3), 2, noise(1, 1, frames=2))
    (message,) = Unpacker(ToEngine).feed(pack(Submit(request)))
    assert message.request == request
    assert [p.picture.digest for p in message.request.pictures] == [p.picture.digest for p in request.pictures]


def test_the_experts_of_pictures_are_counted_apart():
    engine = engine_of(sighted_decoder())
    answer = answers(engine, asked("1", 3, 4, noise(2, 3), 5))["1"]
    text, vision = ([sum(bank.counts) for bank in engine.experts_load() if bank.vision is sees] for sees in (False, True))
    assert vision == [2 * 8] * 3, "six tokens of the picture and the two marks around them, each to two experts"
    assert text == [2 * (3 + len(answer) - 1)] * 3, "the last token is sampled and never computed"
