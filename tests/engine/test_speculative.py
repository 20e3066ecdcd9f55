"""Drafts change how fast an answer comes, and nothing else: everything a request gets equals what it gets without them."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.client import LLM
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.grammar import Grammars
from ernie45.engine.output import Output
from ernie45.engine.request import FinishReason, Request, SamplingParams
from ernie45.engine.sampler import sample
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.engine.speculate import Speculation, SpeculationConfig, StepTime
from ernie45.errors import ConfigError
from ernie45.models.text import Decoder
from tests.engine.test_engine import DENSE, EXPERTS, VECTORS, ask, build, prompts, serve
from tests.engine.test_grammar import TOKENIZER


@pytest.fixture(scope="module", params=[DENSE, VECTORS, EXPERTS], ids=["dense", "vectors", "experts"])
def decoder(request):
    return build(request.param)


class Oracle:
    """Drafts what the answers are known to be, but for every so many-th token, which it gets wrong."""

    def __init__(self, answers, wrong):
        self.answers, self.wrong = answers, wrong

    def draft(self, rows, states):
        drafts = {}
        for row in rows:
            done = len(states[row.request_id].output)
            known = self.answers[row.request_id][0][done : done + row.room]
            draft = tuple(token if (done + i + 1) % self.wrong else (token + 1) % 67 for i, token in enumerate(known))
            if row.room and draft:
                drafts[row.request_id] = draft
        return drafts

    def follow(self, rows, hidden_TD):
        assert len(hidden_TD) == sum(len(row.tokens) for row in rows)

    def forget(self, request_id):
        pass


def eager(decoder, *, most=7, grammars=None, new_seed=None, **config):
    """An engine that drafts as much as it may, worth while or not."""
    more = {} if new_seed is None else {"new_seed": new_seed}
    engine = Engine(decoder, EngineConfig(**config, speculation=SpeculationConfig(by="ngram", most=most)), grammars=grammars, **more)
    return _urged(engine, most)


def _urged(engine, most=7):
    engine._speculation.lengths = lambda decoding: dict.fromkeys(decoding, most)
    return engine


def monotonous(config):
    """A decoder whose greedy answers soon run in circles."""
    return Decoder(config).initialise(torch.Generator().manual_seed(1), std=0.12).eval()


def assert_equal(got, plain):
    """Ids, tops and ends are equal; log probabilities up to float32 sums, which several rows make in another order."""
    shown = [
        {
            name: (tokens, [[(e.token, [i for i, _ in e.top]) for e in entries] for entries in scored], finish)
            for name, (tokens, *scored, finish) in a.items()
        }
        for a in (got, plain)
    ]
    assert shown[0] == shown[1]
    flat = [[e.logprob for name in sorted(a) for entries in a[name][1:3] for e in entries] for a in (got, plain)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-4)


KINDS = {
    "greedy": {},
    "seeds": {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    "top_k": {"temperature": 1.2, "top_k": 6, "min_p": 0.05, "seed": 8},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "drawn penalties": {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "logit_bias": {9: 2.0, 11: -3.0}},
    "bad words": {"bad_words": ((7,), (9, 12)), "min_tokens": 9},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
    "stops": {"stop_token_ids": (9, 13, 30, 44), "min_tokens": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [10**9, 5, 2, 1], ids=["all right", "most right", "half right", "all wrong"])
def test_every_setting_gives_the_same_answers(decoder, kind, wrong):
    work = [ask(i, prompt, **({"max_tokens": 24} | KINDS[kind])) for i, prompt in enumerate(prompts(6))]
    plain = serve(Engine(decoder, EngineConfig(page_size=4, num_pages=80)), work)
    engine = eager(decoder, page_size=4, num_pages=24, token_budget=40)
    engine._runner._drafter = Oracle(plain, wrong)
    assert_equal(serve(engine, work), plain)


@settings(max_examples=15, deadline=None)
@given(
    budget=st.integers(1, 60),
    running=st.integers(1, 6),
    page=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 20),
    sharing=st.booleans(),
    most=st.integers(1, 16),
    wrong=st.integers(1, 9),
    kv=st.sampled_from(["whole", "int8"]),
)
def test_nothing_decided_around_drafts_changes_an_answer(budget, running, page, spare, sharing, most, wrong, kv):
    decoder = _decoder()
    work = [ask(i, prompt, max_tokens=20, temperature=0.7 * (i % 2), seed=i) for i, prompt in enumerate(prompts(6))]
    limits = {"page_size": page, "num_pages": -(-48 // page) + spare, "max_running": running, "prefix_sharing": sharing, "kv": kv}
    plain = _answers(kv)
    engine = eager(decoder, most=most, token_budget=budget, **limits)
    engine._runner._drafter = Oracle(plain, wrong)
    assert {name: answer[0] for name, answer in serve(engine, work).items()} == {name: answer[0] for name, answer in plain.items()}


_KEPT = {}


def _decoder():
    return _KEPT.setdefault("decoder", build(DENSE))


def _answers(kv):
    if kv not in _KEPT:
        work = [ask(i, prompt, max_tokens=20, temperature=0.7 * (i % 2), seed=i) for i, prompt in enumerate(prompts(6))]
        _KEPT[kv] = serve(Engine(_decoder(), EngineConfig(num_pages=64, kv=kv)), work)
    return _KEPT[kv]


@pytest.mark.parametrize("config", [DENSE, VECTORS, EXPERTS], ids=["dense", "vectors", "experts"])
def test_texts_that_repeat_are_drafted_from(config):
    decoder = monotonous(config)
    stem = [5, 9, 30, 41, 8, 12, 60, 33]
    work = [ask(i, stem * 3 + [i + 3], max_tokens=60, ignore_eos=True) for i in range(4)]
    plain = serve(Engine(decoder, EngineConfig(num_pages=64)), work)
    engine = eager(decoder, num_pages=64)
    for request in work:
        engine.submit(request)
    outputs, steps = [], 0
    while not engine.idle:
        outputs += engine.step()
        steps += 1
    for name, (tokens, *_) in plain.items():
        assert [token for out in outputs if out.request_id == name for token in out.tokens] == tokens
    accepted, drafted = sum(out.accepted for out in outputs), sum(out.drafted for out in outputs)
    assert sum(len(out.tokens) for out in outputs) == 240
    assert 0 < accepted <= drafted
    assert all(out.accepted == len(out.tokens) - 1 for out in outputs), "each step brings one token of its own"
    assert steps < 60, "greedy answers of random weights soon run in circles"


def test_a_grammar_is_followed_through_drafts():
    decoder = build(dataclasses.replace(DENSE, vocab_size=TOKENIZER.vocab_size))
    grammars = Grammars(TOKENIZER)
    text = '{"name": "abc abc abc", "n": [12, 12, 12, 12]}'
    shape = 'start: "{\\"name\\": \\"" /[a-c ]{11}/ "\\", \\"n\\": [" /[0-9]{2}(, [0-9]{2}){3}/ "]}"'
    end = TOKENIZER.eos_ids[0]

    def answers(engine):
        for i in range(3):
            params = SamplingParams(max_tokens=70, temperature=0.6 * (i > 0), seed=i)
            engine.submit(Request(id=str(i), prompt=tuple(TOKENIZER.encode(text)), params=params, eos_ids=(end,), grammar=shape))
        found = {}
        while not engine.idle:
            for out in engine.step():
                found.setdefault(out.request_id, []).append(out)
        return found

    plain = answers(Engine(decoder, EngineConfig(num_pages=64), grammars=grammars))
    drafted = answers(eager(decoder, num_pages=64, grammars=grammars))
    for name, outputs in plain.items():
        assert [t for out in drafted[name] for t in out.tokens] == [t for out in outputs for t in out.tokens]
        assert drafted[name][-1].finish is outputs[-1].finish is FinishReason.stop
    assert sum(out.accepted for outputs in drafted.values() for out in outputs) > 0


def test_a_grammar_that_fails_in_a_draft_ends_behind_the_same_tokens():
    decoder = build(dataclasses.replace(DENSE, vocab_size=TOKENIZER.vocab_size))
    words = tuple((token,) for token in TOKENIZER.encode("c"))
    request = Request(
        id="a", prompt=(5, 6, 7), params=SamplingParams(max_tokens=9, temperature=0.0, bad_words=words), eos_ids=TOKENIZER.eos_ids,
        grammar='start: "ab" "c" "d"',
    )  # fmt: skip
    grammars = Grammars(TOKENIZER)
    plain = serve(Engine(decoder, EngineConfig(num_pages=8), grammars=grammars), [request])
    engine = eager(decoder, num_pages=8, grammars=grammars)
    engine._runner._drafter = Oracle({"a": (TOKENIZER.encode("abcd"),)}, 10**9)
    assert serve(engine, [request]) == plain
    assert (plain["a"][0], plain["a"][3]) == (TOKENIZER.encode("ab"), FinishReason.grammar)


def test_a_step_that_breaks_in_verifying_remembers_nothing(monkeypatch):
    decoder = build(DENSE)
    work = [ask(i, prompt, max_tokens=20, frequency_penalty=0.5, temperature=0.5, seed=i) for i, prompt in enumerate(prompts(3))]
    plain = serve(Engine(decoder, EngineConfig(num_pages=64)), work)
    engine = eager(decoder, num_pages=64)
    engine._runner._drafter = Oracle(plain, 10**9)
    calls = itertools.count()

    def breaking(logits_RV, states):
        if next(calls) == 7:  # a second or later choice of a step that verifies drafts
            raise MemoryError("no memory")
        return sample(logits_RV, states)

    monkeypatch.setattr("ernie45.engine.verify.sample", breaking)
    assert serve(engine, work) == plain
    assert next(calls) > 8


# ---- in distribution


SAMPLES = 2500
SAMPLED = SamplingParams(max_tokens=3, temperature=3.0, top_k=6, top_p=0.95, min_p=0.02, frequency_penalty=0.5)


def _next(decoder, prompt, output):
    """The probability of each next token by the request's whole chain, written out plainly in float64."""
    logits = decoder.prompt_logits([*prompt, *output])[-1].double()
    for token, count in Counter(output).items():
        logits[token] -= SAMPLED.frequency_penalty * count
    logits /= SAMPLED.temperature
    order = logits.argsort(descending=True)[: SAMPLED.top_k]
    chances = logits[order].softmax(0)
    kept = (chances.cumsum(0) - chances < SAMPLED.top_p) & (chances >= SAMPLED.min_p * chances[0])
    return dict(zip(order[kept].tolist(), (chances[kept] / chances[kept].sum()).tolist(), strict=True))


def _wrong_after_rejection(chances, guess):
    """A rule that draws again from the whole distribution where the guess was not taken, in place of the rest of it."""
    again = 1 - chances[guess]
    return {token: chance * again + (chances[guess] if token == guess else 0.0) for token, chance in chances.items()}


def _chi_square(counts, chances):
    """Pearson's statistic over answers that are expected at least five times, the others together; and its degrees of freedom."""
    often = {answer: SAMPLES * chance for answer, chance in chances.items() if SAMPLES * chance >= 5}
    rest = SAMPLES - sum(often.values())
    statistic = sum((counts[answer] - expected) ** 2 / expected for answer, expected in often.items())
    seldom = sum(count for answer, count in counts.items() if answer not in often)
    return statistic + ((seldom - rest) ** 2 / rest if rest >= 5 else 0.0), len(often) - (rest < 5)


class Likeliest(Oracle):
    """Guesses the likeliest token behind what there is, and one behind it."""

    def __init__(self, guesses):
        self.guesses = guesses

    def draft(self, rows, states):
        drafts = {}
        for row in rows:
            output = tuple(states[row.request_id].output)
            if row.room:
                drafts[row.request_id] = (self.guesses[output],)
        return drafts


def test_drawn_answers_have_the_distribution_they_have_without_drafts():
    """Chi-square below its 99.99 % point (Wilson and Hilferty); a wrong rule lies far above."""
    decoder, prompt = build(DENSE, seed=4), (5, 6, 7, 8)
    chances, wrong, guesses = {}, {}, {}
    for first, p in _next(decoder, prompt, ()).items():
        second = _next(decoder, prompt, (first,))
        guesses[first,] = max(second, key=lambda token: second[token])
        mistaken = _wrong_after_rejection(second, guesses[first,])
        for token, q in second.items():
            for third, r in _next(decoder, prompt, (first, token)).items():
                chances[first, token, third] = p * q * r
                wrong[first, token, third] = p * mistaken[token] * r
    seeds = itertools.count()
    engine = eager(decoder, num_pages=400, max_running=100, new_seed=lambda: next(seeds))
    engine._runner._drafter = Likeliest(guesses)
    counts, drafted, accepted = Counter(), 0, 0
    for i in range(SAMPLES):
        engine.submit(Request(id=str(i), prompt=prompt, params=SAMPLED))
    found = {}
    while not engine.idle:
        for out in engine.step():
            found[out.request_id] = found.get(out.request_id, ()) + out.tokens
            drafted, accepted = drafted + out.drafted, accepted + out.accepted
    counts = Counter(found.values())
    assert set(counts) <= set(chances), "an answer that the cuts forbid"
    statistic, freedom = _chi_square(counts, chances)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound
    assert drafted == SAMPLES
    expected = sum(chance for answer, chance in chances.items() if answer[1] == guesses[answer[:1]])
    assert abs(accepted / drafted - expected) < 4 * math.sqrt(expected * (1 - expected) / drafted), (
        "a guess is taken as often as it is right"
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.tensor(list(wrong.values())), SAMPLES, replacement=True, generator=generator).tolist()
    mistaken, _ = _chi_square(Counter(list(wrong)[i] for i in drawn), chances)
    assert mistaken > 1.5 * bound, "the test would not notice a wrong rule"


# ---- what is learned


def plan_of(*names):
    return Plan(tuple(PlanRow(name, (1,), 8, (0,), True) for name in names))


def taught(right, *, step=1.0, row=0.1, rounds=60):
    """What a policy has learned of one request when `right` of ten drafts are right, where a step costs `step` and each row `row`."""
    policy = Speculation(7)
    for i in range(rounds):
        count = policy.lengths(("a",)).get("a", 0)
        got = 0
        while got < count and (i * 7 + got * 3) % 10 < right:
            got += 1
        policy.note(plan_of("a"), {"a": count} if count else {}, {"a": got}, step + row * (1 + count), 0.0)
    return policy


def test_drafts_are_as_long_as_they_are_worth():
    assert taught(10).lengths(("a",))["a"] == 7
    assert 1 <= taught(5).lengths(("a",)).get("a", 0) <= 3
    assert "a" not in taught(0, rounds=50).lengths(("a",))
    assert "a" not in taught(4, step=0.01, row=1.0, rounds=50).lengths(("a",)), "where rows are all that a step costs, a guess must be sure"


def test_who_drafts_in_vain_tries_now_and_then():
    policy = taught(0, rounds=20)
    counts = []
    for _ in range(100):
        counts.append(policy.lengths(("a",)).get("a", 0))
        policy.note(plan_of("a"), {"a": counts[-1]} if counts[-1] else {}, {"a": 0}, 1.1 + 0.1 * counts[-1], 0.0)
    assert set(counts) == {0, 2}
    assert 3 <= sum(map(bool, counts)) <= 5


def test_a_full_house_drafts_less():
    policy = taught(8, step=1.0, row=0.1)
    assert policy.lengths(("a",))["a"] > policy.lengths(("a", *map(str, range(40)))).get("a", 0)


def test_the_time_of_a_step_is_fitted_and_noise_is_not_believed():
    time = StepTime()
    for rows in (1, 4, 8, 2, 1, 8) * 6:
        time.note(rows, 3.0 + 0.5 * rows)
    assert time.line() == pytest.approx((3.0, 0.5))
    time.note(1, 500.0)
    assert time.line() == pytest.approx((3.0, 0.5), rel=0.5)
    alone = StepTime()
    alone.note(4, 2.0)
    assert alone.line() == pytest.approx((1.8, 0.05))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"by": "magic"}, ("magic", "ngram")),
        ({"by": "ngram", "most": 0}, ("0", "1 to 64", "off")),
        ({"by": "ngram", "most": 1000}, ("1000", "1 to 64")),
    ],
)
def test_settings_that_make_no_sense(settings_, words):
    with pytest.raises(ConfigError) as refused:
        SpeculationConfig(**settings_)
    assert all(word in str(refused.value) for word in words)


# ---- behind the engine


def test_several_tokens_of_a_step_are_read_one_by_one():
    whole = Output("a", (5, 6, 7), (), (), FinishReason.stop, 3, 4, 2)
    singles = list(whole.one_by_one())
    assert [(one.tokens, one.finish, one.drafted, one.accepted) for one in singles] == [
        ((5,), None, 4, 2), ((6,), None, 0, 0), ((7,), FinishReason.stop, 0, 0),
    ]  # fmt: skip
    assert list(singles[0].one_by_one()) == [singles[0]]


def test_stop_strings_and_budgets_cut_between_tokens_of_a_step():
    decoder = monotonous(dataclasses.replace(DENSE, vocab_size=TOKENIZER.vocab_size))
    llm, drafted = (LLM(decoder, tokenizer=TOKENIZER, num_pages=64, speculative=by) for by in ("off", "ngram"))
    _urged(drafted._engine)
    prompt = TOKENIZER.encode("abc abc abc abc abc")
    params = SamplingParams(max_tokens=60, temperature=0.0)
    (plain,) = llm.generate([prompt], params)
    assert len(plain.text) > 20
    for start in (3, 17, 18, 19, 25):
        stop = dataclasses.replace(params, stop=(plain.text[start : start + 3],))
        (one,), (two,) = llm.generate([prompt], stop), drafted.generate([prompt], stop)
        assert (two.text, two.token_ids, two.finish_reason) == (one.text, one.token_ids, one.finish_reason)
    (whole,) = drafted.generate([prompt], params)
    assert whole.token_ids == plain.token_ids
    assert whole.accepted_tokens > 0
