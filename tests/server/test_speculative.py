"""Several tokens of one step, as drafts bring them, behind the protocols; and predicted outputs."""

import dataclasses

import pytest

from tests.server.conftest import servers


@pytest.fixture(scope="module")
def running():
    """An engine whose steps bring up to four tokens, three of them guessed ahead and one guessed in vain."""
    with servers() as start:
        made = start(speculative="ngram")
        fake = made.engine.fake
        step = fake.step

        def four():
            whole = {}
            for _ in range(4):
                for out in step():
                    if (before := whole.get(out.request_id)) is not None:
                        out = dataclasses.replace(out, tokens=before.tokens + out.tokens, logprobs=before.logprobs + out.logprobs)
                    whole[out.request_id] = out
            return tuple(dataclasses.replace(out, drafted=len(out.tokens), accepted=len(out.tokens) - 1) for out in whole.values())

        fake.step = four
        yield made


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_answers_end_between_the_tokens_of_a_step(running):
    for length in range(1, 9):
        body = running.chat("«abcdefghijkl»", max_tokens=length).json()
        assert body["choices"][0]["message"]["content"] == "abcdefghijkl"[:length]
        assert body["usage"]["completion_tokens"] == length
    for stop in ("b", "cd", "ef", "h"):
        body = running.chat("«abcdefghijkl»", stop=stop).json()
        assert body["choices"][0]["message"]["content"] == "abcdefghijkl".partition(stop)[0]
        assert body["usage"]["completion_tokens"] == len("abcdefghijkl".partition(stop)[0] + stop), (
            "nothing behind the stop string is counted"
        )


def test_usage_and_metrics_tell_of_drafts(running):
    before = counters(running)
    details = running.chat("«abcdefgh»", max_tokens=8).json()["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (6, 2)
    after = counters(running)
    assert {name: after[name] - before[name] for name in after} == {"draft": 8, "accepted": 6}


def counters(running):
    lines = running.client().get("/metrics").text.splitlines()
    return {
        name: sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:spec_decode_num_{name}_tokens_total"))
        for name in ("draft", "accepted")
    }


@pytest.mark.parametrize("text", ["abc def", [{"type": "text", "text": "abc "}, {"type": "text", "text": "def"}]])
def test_a_prediction_reaches_the_engine(running, text):
    assert content(running.chat("«abc def»", prediction={"type": "content", "content": text})) == "abc def"
    assert running.engine.submitted[-1].prediction == tuple(running.engine.fake.tokenizer.encode("abc def"))


def test_a_wrong_prediction_is_a_400(running):
    error = running.chat(prediction={"type": "text", "content": "x"}).json()["error"]
    assert error["param"] == "prediction.type"
