"""Each filter against a plain float64 twin or transformers' processors; the draw against its distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ernie45.engine.request import Request, SamplingParams
from ernie45.engine.sampler import SampleState, adjust, choose, cut_offs, sample, score, uniform

V = 1000


def state(output=(), prompt=(1, 2, 3), eos=(), vocab=V, **params):
    made = SampleState.of(Request(id="x", prompt=prompt, params=SamplingParams(**params), eos_ids=eos), params.get("seed") or 0, vocab)
    for token in output:
        made.append(token)
    return made


def random_logits(rows, vocab=V, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=150, deadline=None)
@given(
    temperature=st.floats(0.1, 5.0),
    top_k=st.sampled_from([0, 1, 2, 40, 300, 999, 1000]),
    top_p=st.sampled_from([1.0, 0.999999, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 50),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_what_stays_is_what_transformers_keeps(temperature, top_k, top_p, min_p, seed, scale):
    logits = random_logits(3, seed=seed, scale=scale)
    theirs = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    before_p = theirs
    if top_p < 1.0:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p:
        theirs = MinPLogitsWarper(min_p)(None, theirs)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    ours = scaled >= cut_offs(scaled, [top_k] * 3, [top_p] * 3, [min_p] * 3)[:, None]
    differs = ours != theirs.isfinite()
    # sums of 1,000 float32 masses: a token whose cumulative mass is within 2e-5 of top_p, or its ratio of min_p, may fall either way
    mass = before_p.softmax(-1)
    order = mass.argsort(-1, descending=True)
    before = torch.empty_like(mass).scatter(1, order, mass.gather(1, order).cumsum(-1) - mass.gather(1, order))
    close = ((before - top_p).abs() < 2e-5) | ((mass / mass.amax(-1, keepdim=True) - min_p).abs() < 2e-5)
    assert not bool((differs & ~close).any())


def test_ties_at_a_cut_stay_and_the_window_does_not_matter():
    logits = torch.zeros(1, 5000)
    logits[0, 4000:] = 1.0  # a thousand equal ones, more than the first window holds
    assert int((logits - 1 >= cut_offs(logits - 1, [5], [1.0], [0.0])[:, None]).sum()) == 1000
    assert int((logits - 1 >= cut_offs(logits - 1, [0], [0.1], [0.0])[:, None]).sum()) == 1000
    flat = random_logits(1, vocab=30_000, scale=0.01)
    flat -= flat.max()
    alone = cut_offs(flat, [0], [0.9], [0.0])
    assert 25_000 < int((flat >= alone[:, None]).sum()) < 29_000
    wide = cut_offs(torch.cat([flat, flat]), [0, 20_000], [0.9, 1.0], [0.0, 0.0])
    assert wide[0] == alone[0]


def test_penalties_equal_the_plain_formulas():
    output = [5, 9, 9, 9]
    made = state(output, repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=-0.2)
    logits = random_logits(2)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, *output]]), logits[:1].double().clone())
    for token, count in ((5, 1), (9, 3)):
        expected[0, token] -= -0.2 * count + 0.3
    untouched = logits[1].clone()
    adjust(logits, [made, state()])
    assert torch.allclose(logits[:1].double(), expected, atol=1e-6)  # one float32 rounding
    assert torch.equal(logits[1], untouched)


def test_bias_bad_words_and_min_tokens():
    logits = random_logits(1)
    words = ((7,), (4, 8), (4, 5, 9), (9, 9))
    theirs = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=torch.tensor([0]))
    expected = theirs(torch.tensor([[3, 4, 5]]), logits.double().clone())
    expected[0, 11] += 2.5
    expected[0, [20, 21]] = -math.inf
    adjust(logits, [state((3, 4, 5), bad_words=words, logit_bias={11: 2.5}, min_tokens=4, eos=(20,), stop_token_ids=(21,))])
    assert logits[0].isneginf().nonzero().flatten().tolist() == [7, 9, 20, 21]
    assert torch.allclose(logits.double(), expected, atol=1e-6)
    later = random_logits(1)
    adjust(later, [state((3, 4, 5, 6), min_tokens=4, eos=(20,))])
    assert torch.equal(later, random_logits(1))


def test_a_bad_word_does_not_reach_into_the_prompt():
    logits = random_logits(1)
    adjust(logits, [state((), prompt=(4,), bad_words=((4, 8),))])
    assert torch.equal(logits, random_logits(1))


@pytest.mark.parametrize("params", [{}, {"top_k": 12}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 1.7}, {"top_k": 20, "top_p": 0.8}])
def test_draws_follow_the_distribution(params):
    """Chi-square over 20,000 draws; the bound is 6 standard deviations of the statistic, passed by chance less than once in 10^6 runs."""
    vocab, draws = 40, 20_000
    logits = random_logits(1, vocab=vocab, scale=1.5)
    scaled = logits.double() / params.get("temperature", 1.0)
    for warper in (
        TopKLogitsWarper(params["top_k"]) if "top_k" in params else None,
        TopPLogitsWarper(params["top_p"]) if "top_p" in params else None,
        MinPLogitsWarper(params["min_p"]) if "min_p" in params else None,
    ):
        scaled = scaled if warper is None else warper(None, scaled)
    truth = scaled.softmax(-1)[0]
    chosen = choose(logits.expand(draws, vocab).clone(), [state(vocab=vocab, seed=seed, **params) for seed in range(draws)])
    counts = torch.bincount(torch.tensor(chosen), minlength=vocab).double()
    assert int(counts[truth == 0].sum()) == 0
    likely = truth * draws >= 5
    expected = truth[likely] * draws
    statistic = float(((counts[likely] - expected) ** 2 / expected).sum())
    freedom = int(likely.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 6


def test_random_numbers_depend_on_seed_and_place_and_are_even():
    numbers = torch.tensor([[uniform(seed, index) for index in range(100)] for seed in range(100)], dtype=torch.float64)
    assert len(numbers.unique()) == 10_000
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    assert abs(float(numbers.mean()) - 0.5) < 6 * math.sqrt(1 / 12 / 10_000)
    assert abs(float((numbers[:, 1:] * numbers[:, :-1]).mean()) - 0.25) < 0.01
    assert uniform(-(2**63), 0) != uniform(2**63 - 1, 0)


def test_a_row_does_not_depend_on_its_neighbours():
    kinds = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 3},
        {"seed": 3, "top_p": 0.99999},
        {"seed": 4, "top_k": 900, "top_p": 0.5, "repetition_penalty": 1.2},
        {"seed": 5, "min_p": 0.3, "logprobs": 4},
        {"seed": 6, "temperature": 0.0, "bad_words": ((1,),), "logprobs": 0},
        {"seed": 7, "temperature": 100.0},
        {"seed": 8, "temperature": 2e-5},
    ]
    logits = random_logits(len(kinds))
    states = [state((3, 7), **kind) for kind in kinds]
    together = sample(logits.clone(), states)
    for i in range(len(kinds)):
        alone = sample(logits[i : i + 1].clone(), states[i : i + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])
    assert [entry is not None for entry in together.logprobs] == ["logprobs" in kind for kind in kinds]
    assert together.tokens[0] == int(logits[0].argmax()) == sample(logits[:1].clone(), [state(temperature=1e-9)]).tokens[0]


def test_logprobs_are_raw():
    logits = random_logits(1)
    best = int(logits.argmax())
    got = sample(logits.clone(), [state(temperature=0.0, logprobs=2, logit_bias={best: -100.0}, repetition_penalty=1.9)])
    truth = logits[0].double().log_softmax(-1)
    entry = got.logprobs[0]
    assert got.tokens[0] != best
    assert entry.top[0] == (best, pytest.approx(float(truth[best]), abs=1e-5))
    assert entry.logprob == pytest.approx(float(truth[got.tokens[0]]), abs=1e-5)
    assert score(logits, [best], [0])[0].top == ()


def test_rows_without_numbers_and_rows_without_choice_fail_alone():
    logits = random_logits(4)
    logits[0, 5] = float("nan")
    logits[1, 5] = float("inf")
    logits[2] = -math.inf
    states = [state(seed=i, logprobs=1) for i in range(4)]
    got = sample(logits, states)
    assert got.tokens[:3] == (None, None, None)
    assert got.logprobs[:3] == (None, None, None)
    assert got.tokens[3] is not None
    narrow = random_logits(1, vocab=3)
    assert sample(narrow, [state(prompt=(1,), vocab=3, bad_words=((0,), (1,), (2,)))]).tokens == (None,)
