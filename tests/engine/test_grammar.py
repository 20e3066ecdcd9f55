"""Grammars: what the mask allows, where they end, what is refused; and in the real sampler, over a tiny decoder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.fake import fake_tokenizer
from ernie45.engine.grammar import MAX_GRAMMAR, Grammars
from ernie45.engine.request import FinishReason, Request, SamplingParams
from ernie45.engine.sampler import unpacked
from ernie45.errors import RequestError
from ernie45.models.config import TextConfig
from ernie45.models.text import Decoder

TOKENIZER = fake_tokenizer()
EOS = 2


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER)


@pytest.fixture(scope="module")
def engine(grammars):
    config = TextConfig(
        hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, ffn_size=16, vocab_size=300, rope_theta=1e4, norm_eps=1e-5,
        max_positions=128, tie_embeddings=True,
    )  # fmt: skip
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(0)).eval()
    return Engine(decoder, EngineConfig(page_size=4, num_pages=64), available=1 << 30, grammars=grammars)


def allowed(matcher):
    bits = matcher.allowed()
    return {id for id in range(TOKENIZER.vocab_size) if bits[id // 8] >> id % 8 & 1}


def test_the_mask_allows_what_the_grammar_does_and_the_end_only_at_the_end(grammars):
    matcher = grammars.matcher('start: "a" /[bc]/', (EOS,))
    for text in ("a", "bc"):
        assert allowed(matcher) == set(TOKENIZER.encode(text))
        assert matcher.consume(TOKENIZER.encode(text)[0])
    assert allowed(matcher) == {EOS}
    assert matcher.over
    assert matcher.accepting


def test_a_token_that_is_not_allowed_is_not_taken(grammars):
    assert not grammars.matcher('start: "a"', (EOS,)).consume(TOKENIZER.encode("b")[0])


def test_control_tokens_are_no_text(grammars):
    control = TOKENIZER.id_of("<think>")
    assert control not in allowed(grammars.matcher("start: /(.|\\n)*/", (EOS,)))
    assert control in allowed(grammars.matcher(f"start: <[{control}]>", (EOS,)))


@pytest.mark.parametrize("grammar", ["start: nope", "", "start: /(/", "x" * (MAX_GRAMMAR + 1)])
def test_what_cannot_be_compiled_is_refused_by_name(grammars, grammar):
    with pytest.raises(RequestError) as caught:
        grammars.check(grammar, "guided_grammar", (EOS,))
    assert caught.value.field == "guided_grammar"
    with pytest.raises(RequestError):
        grammars.matcher(grammar, (EOS,))


def test_a_grammar_needs_an_end(grammars):
    with pytest.raises(RequestError, match="end-of-text"):
        grammars.check('start: "a"', "guided_grammar", ())


@given(st.binary(min_size=1, max_size=20), st.integers(1, 200))
def test_unpacking_a_mask(bits, size):
    mask = unpacked(bits, size)
    assert len(mask) == size
    assert mask.tolist() == [n < 8 * len(bits) and bool(bits[n // 8] >> n % 8 & 1) for n in range(size)]


def answer(engine, **fields):
    params = fields.pop("params", SamplingParams(max_tokens=40, seed=3))
    engine.submit(Request(id="a", prompt=tuple(TOKENIZER.encode("hello")), params=params, eos_ids=(EOS,), **fields))
    ids, finish = [], None
    while not engine.idle:
        for output in engine.step():
            ids += output.tokens
            finish = output.finish or finish
    engine.verify()
    return TOKENIZER.decode(ids), finish


@pytest.mark.parametrize("seed", range(5))
def test_random_weights_follow_a_grammar(engine, seed):
    text, finish = answer(engine, grammar='start: /[0-9]{4}/ "-" ("x" | "yz")', params=SamplingParams(seed=seed, max_tokens=40))
    assert text[:4].isdigit()
    assert text[4:] in ("-x", "-yz")
    assert finish is FinishReason.stop


def test_a_complete_grammar_ends_before_min_tokens(engine):
    assert answer(engine, grammar='start: "ab"', params=SamplingParams(min_tokens=9, max_tokens=40)) == ("ab", FinishReason.stop)


def test_a_grammar_that_nothing_can_follow_ends_with_an_error_of_that_request_alone(engine):
    words = tuple((id,) for id in TOKENIZER.encode("ab"))
    assert answer(engine, grammar="start: /[ab]/", params=SamplingParams(bad_words=words, max_tokens=9))[1] is FinishReason.grammar
    assert answer(engine, grammar='start: "ok"') == ("ok", FinishReason.stop)


def test_an_engine_without_a_tokenizer_refuses_grammars(engine):
    bare = Engine(engine._runner._decoder, EngineConfig(page_size=4, num_pages=64), available=1 << 30)
    with pytest.raises(RequestError, match="tokenizer"):
        bare.submit(Request(id="a", prompt=(1,), eos_ids=(2,), grammar='start: "a"'))
    assert bare.idle


def test_ignoring_the_end_and_a_grammar_do_not_go_together():
    with pytest.raises(RequestError, match="ignore_eos"):
        Request(id="a", prompt=(1,), params=SamplingParams(ignore_eos=True), grammar="start: /a/")


def test_embeddings_have_length_one_and_depend_on_the_order(engine):
    one, other = engine.embed([5, 6, 7]), engine.embed([7, 6, 5])
    assert sum(x * x for x in one) == pytest.approx(1)
    assert one != other
    assert engine.embed([5, 6, 7]) == one
    for wrong in ([], [10**6], [5] * 200):
        with pytest.raises(RequestError):
            engine.embed(wrong)


def test_what_is_asked_often_is_compiled_once_and_answers_do_not_meet(monkeypatch):
    import llguidance

    counts = {"check": 0, "matcher": 0}
    validate, make = llguidance.LLMatcher.validate_grammar, llguidance.LLMatcher

    class Counted:
        @staticmethod
        def validate_grammar(*args, **kwargs):
            counts["check"] += 1
            return validate(*args, **kwargs)

        def __new__(cls, *args, **kwargs):
            counts["matcher"] += 1
            return make(*args, **kwargs)

    monkeypatch.setattr(llguidance, "LLMatcher", Counted)
    fresh = Grammars(TOKENIZER)
    grammar = 'start: "a" "b"'
    for _ in range(3):
        fresh.check(grammar, "x", (EOS,))
    first, second = fresh.matcher(grammar, (EOS,)), fresh.matcher(grammar, (EOS,))
    assert first.consume(TOKENIZER.encode("a")[0])
    assert allowed(first) == set(TOKENIZER.encode("b"))
    assert allowed(second) == allowed(fresh.matcher(grammar, (EOS,))) == set(TOKENIZER.encode("a"))
    assert counts == {"check": 1, "matcher": 2}  # the check asks a matcher of its own for the first token
    for n in range(200):
        fresh.matcher(f'start: "a{n}"', (EOS,))
    assert len(fresh._compiled) == 64
    large = "start: " + " | ".join(f'"word{n}"' for n in range(8000))
    fresh.check(large, "x", (EOS,))
    assert all(len(text) < len(large) for text, _ in fresh._passed)
    for _ in range(2):
        with pytest.raises(RequestError):
            fresh.check("start: nope", "x", (EOS,))


def test_a_grammar_that_broke_on_its_limits_is_not_tried_again():
    """Its copies would share what was built so far, and go on building in the engine's time. A wrong token breaks nothing."""
    fresh = Grammars(TOKENIZER)
    hostile, sound = "start: /b*(a{1000}){1000}/", 'start: "a" "b"'
    matcher = fresh.matcher(hostile, (EOS,))
    for letter in "bbaaa":
        matcher.allowed()
        if not matcher.consume(TOKENIZER.encode(letter)[0]):
            break
    else:
        pytest.fail("the limits let it through")
    with pytest.raises(RequestError, match="too complex"):
        fresh.matcher(hostile, (EOS,))
    assert not fresh.matcher(sound, (EOS,)).consume(TOKENIZER.encode("b")[0])
    assert allowed(fresh.matcher(sound, (EOS,))) == set(TOKENIZER.encode("a"))
