"""A field that is honoured reaches the engine as what it means."""

import pytest

from ernie45.engine.request import SamplingParams


def params(running, **fields):
    response = running.chat("x", **({"max_tokens": 2} | fields))
    assert response.status_code == 200, response.text
    return running.engine.submitted[-1].params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.5), ("top_p", 0.25), ("top_k", 7), ("min_p", 0.125), ("presence_penalty", 0.5), ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.5), ("seed", 11), ("max_tokens", 1), ("min_tokens", 2), ("ignore_eos", True),
        ("include_stop_str_in_output", True), ("prompt_logprobs", 0),
    ],
)  # fmt: skip
def test_numbers_and_switches_arrive(running, field, value):
    assert getattr(params(running, **{field: value}), field) == value


def test_lists_arrive(running):
    got = params(running, stop="a b", stop_token_ids=[9], logit_bias={"5": -100}, bad_words=["no"], bad_words_token_ids=[[4, 5]])
    spell = running.engine.fake.tokenizer.encode
    assert got.stop == ("a b",)
    assert got.stop_token_ids == (9,)
    assert got.logit_bias == {5: -100}
    assert got.bad_words == ((4, 5), tuple(spell("no")), tuple(spell(" no")))


def test_minus_one_turns_top_k_off(running):
    assert params(running, top_k=-1).top_k == 0


def test_priority_and_salt_arrive(running):
    running.chat("x", max_tokens=1, priority=3, cache_salt="me")
    request = running.engine.submitted[-1]
    assert (request.priority, request.cache_salt) == (3, "me")


def test_whole_numbers_pass_for_fractions_and_nulls_for_nothing(running):
    got = params(running, temperature=1, top_p=None, stop=None, n=None, seed=None, stream=None, logit_bias=None)
    assert got.temperature == 1
    assert got.top_p == SamplingParams().top_p


def test_who_asks_is_told_to_the_log_only(running, until):
    running.chat("«a secret text»", user="ada", prompt_cache_key="k1")
    running.chat("x", max_tokens=1, safety_identifier="bob")
    until(lambda: len(running.log()) == 2)
    first, second = running.log()
    assert (first["user"], first["cache_key"], second["user"]) == ("ada", "k1", "bob")
    assert "secret" not in "".join(running.lines)
