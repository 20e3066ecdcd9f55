"""Chat completions over HTTP: whole, streamed, several answers, stop strings, log probabilities, token ids."""

import pytest


def test_a_whole_answer(running):
    body = running.chat("«Hello, wörld! 🙂»").json()
    [choice] = body["choices"]
    assert body["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "Hello, wörld! 🙂", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("Hello, wörld! 🙂".encode()) + 1
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_a_stream_tells_the_same(running, events):
    text = running.chat("«Hello, wörld! 🙂»", stream=True, stream_options={"include_usage": True}).text
    *chunks, usage, done = events(text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello, wörld! 🙂"
    assert "\ufffd" not in text
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len("Hello, wörld! 🙂".encode()) + 1
    assert len({c["id"] for c in chunks}) == 1


def test_usage_in_every_chunk(running, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events(running.chat("«abc»", stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_several_answers_share_the_prompt(running):
    long = "x" * 100
    body = running.chat(long, n=4, max_tokens=8, seed=1).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert body["usage"]["completion_tokens"] == 32
    # The second to fourth find the first one's pages: prompt tokens were computed about once, not four times.
    load = running.engine.fake.load
    assert load.cached_tokens >= 3 * (body["usage"]["prompt_tokens"] - 8)


def test_streams_of_several_answers_are_marked_by_index(running, events):
    *chunks, _ = events(running.chat("«ab»", n=2, stream=True).text)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == "ab"
        assert mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_work(running, events, until, stream):
    response = running.chat("«one two three four»", stop=[" thr"], stream=stream)
    if stream:
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in events(response.text)[:-1])
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert text == "one two"
    until(lambda: running.engine.fake.idle)


def test_equal_seeds_give_equal_answers(running):
    first, second, other = (running.chat("x", seed=seed, max_tokens=20).json() for seed in (5, 5, 6))
    texts = [body["choices"][0]["message"]["content"] for body in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]


def test_max_tokens_ends_with_length(running):
    for name in ("max_tokens", "max_completion_tokens"):
        body = running.chat("«hello»", **{name: 3}).json()
        assert body["choices"][0]["message"]["content"] == "hel"
        assert body["choices"][0]["finish_reason"] == "length"


def test_log_probabilities(running, events):
    body = running.chat("«hi»", logprobs=True, top_logprobs=2).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["h", "i", "</s>"]
    assert entries[0]["bytes"] == [ord("h")]
    assert [item["logprob"] for item in entries[0]["top_logprobs"]] == [-1.0, -2.0]
    *chunks, _ = events(running.chat("«hi»", logprobs=True, stream=True).text)
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == ["h", "i", "</s>"]


def test_token_ids_go_in_and_out(running, events):
    body = running.chat("«hi»", return_token_ids=True).json()
    prompt, ids = body["prompt_token_ids"], body["choices"][0]["token_ids"]
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert ids == [3 + ord("h"), 3 + ord("i"), 2]
    again = running.chat("this text is not used", prompt_token_ids=prompt).json()
    assert again["choices"][0]["message"]["content"] == "hi"
    *chunks, _ = events(running.chat("«hi»", return_token_ids=True, stream=True).text)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == prompt
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == ids


def test_prompt_log_probabilities(running):
    body = running.chat("abc", prompt_logprobs=1, max_tokens=1).json()
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


def test_an_answer_can_be_begun_by_the_client(running):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I «say»"}]
    body = running.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True}).json()
    assert body["choices"][0]["message"]["content"] == "say"
    prompt = running.engine.fake.tokenizer.decode(running.engine.submitted[-1].prompt, skip_special=False)
    assert prompt.endswith("<|im_start|>assistant\nI «say»")


def test_a_request_of_the_clients_own_id_can_be_alive_once(running, until):
    running.engine.held.set()
    import threading

    first = threading.Thread(target=running.chat, args=("«a»",), kwargs={"request_id": "mine"})
    first.start()
    until(lambda: "mine" in running.service.live)
    second = running.chat("«b»", request_id="mine")
    running.engine.held.clear()
    first.join()
    assert second.status_code == 409
    assert second.json()["error"]["param"] == "request_id"
    assert running.chat("«c»", request_id="mine").json()["id"] == "mine"


def test_a_broken_answer_is_a_500_with_an_id_or_an_event(serve, events):
    running = serve(fails=lambda request: request.params.seed == 666)
    whole = running.chat("«x»", seed=666)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "engine_error"
    *_, error, done = events(running.chat("«x»", seed=666, stream=True).text)
    assert error["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    assert running.chat("«fine»").json()["choices"][0]["message"]["content"] == "fine"


def test_continuous_usage_is_in_every_chunk_the_echo_too(running, events):
    options = {"stream": True, "echo": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, done = events(running.post("/v1/completions", {"prompt": "«yes»", **options}).text)
    assert done == "[DONE]"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert chunks[0]["choices"][0]["text"] == "«yes»"
    assert chunks[-1]["choices"] == []
