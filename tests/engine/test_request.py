"""What a request may say, and how it is told that it may not."""

import math

import pytest

from ernie45.engine.request import Request, SamplingParams
from ernie45.errors import RequestError


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("max_tokens", [0, -1, 1.0, "5", True]),
        ("min_tokens", [-1, None, 0.5]),
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True, 101]),
        ("top_k", [-1, 1.5, None]),
        ("top_p", [0, 0.0, 1.01, -1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, math.inf]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, math.nan]),
        ("logit_bias", [[1], {"1": 1.0}, {-1: 1.0}, {1: math.nan}, {1: 101}]),
        ("bad_words", ["ab", [[]], [1], [["a"]], [[-1]]]),
        ("stop", [[""], [1], {"a": 1}, 5]),
        ("stop_token_ids", [5, "5", [1.0], [True], [-1], [2**31]]),
        ("include_stop_str_in_output", [1, None]),
        ("ignore_eos", ["yes"]),
        ("seed", [1.5, 2**63, -(2**63) - 1, "a"]),
        ("logprobs", [-1, 21, True]),
        ("prompt_logprobs", [-1, 21, 1.0]),
    ],
)
def test_bad_settings_are_named(field, bad):
    for value in bad:
        with pytest.raises(RequestError, match=field) as refused:
            SamplingParams(**{field: value})
        assert refused.value.field == field


def test_good_settings_are_kept_as_plain_values():
    params = SamplingParams(stop="end", stop_token_ids=[3], bad_words=[[1, 2]], logit_bias={4: 1}, temperature=0, seed=-5)
    assert (params.stop, params.stop_token_ids, params.bad_words, params.greedy) == (("end",), (3,), ((1, 2),), True)
    assert Request(id="a", prompt=[1], params=params, eos_ids=[2]).end_ids == {2, 3}
    assert Request(id="a", prompt=[1], params=SamplingParams(ignore_eos=True), eos_ids=[2]).end_ids == frozenset()


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", ()), ("prompt", "text"), ("prompt", [1.5]), ("id", 5), ("params", None), ("priority", "high"), ("cache_salt", None)],
)
def test_bad_requests_are_named(field, value):
    with pytest.raises(RequestError) as refused:
        Request(**({"id": "a", "prompt": [1]} | {field: value}))
    assert refused.value.field == field


def test_min_tokens_within_max_tokens():
    with pytest.raises(RequestError, match="min_tokens is 5, more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
