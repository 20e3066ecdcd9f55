"""What /status.json says of all models together, in the words that the page reads."""

import msgspec

from ernie45.engine.output import BankLoad
from ernie45.engine.wire import Chosen


def test_the_whole_and_the_experts(serve, until):
    running = serve(models=("one", "two"))
    running.chat("«hello»")
    body = running.client().get("/status.json").json()
    assert body["queue"] == {"running": 0, "waiting": 0, "max_running": 4, "max_waiting": 256}
    assert body["totals"]["generated_tokens"] == 6
    assert body["totals"]["prompt_tokens"] > 0
    assert body["cache"]["pages_total"] == 128
    assert body["cache"]["pages_used"] == 0
    assert body["models"][0]["id"] == "one"
    assert body["uptime_seconds"] >= 0
    assert "experts" not in body
    running.loop.call_soon_threadsafe(running.engine.tell, Chosen((BankLoad(1, (3, 0, 1)), BankLoad(1, (2, 2, 0), True))))
    until(lambda: running.service.models[0].experts)
    experts = running.client().get("/status.json").json()["experts"]
    assert experts == {"layers": [{"layer": 1, "load": [3, 0, 1]}, {"layer": 1, "load": [2, 2, 0], "bank": "vision"}]}


def test_the_last_minutes_are_told(serve, until):
    running = serve()
    before = running.client().get("/status.json").json()
    assert before["latency"] == {"window_seconds": 300}
    text = "«hello, you who read this»"
    for _ in range(3):
        tokens = running.chat(text).json()["usage"]
    running.chat("«x»", max_tokens=1)
    assert running.chat("«x»", temperature=0, bad_words_token_ids=[[9999]]).status_code == 400  # never ran: in no count
    body = running.client().get("/status.json").json()
    written, read = 3 * tokens["completion_tokens"] + 1, body["totals"]["prompt_tokens"] - running.engine.fake.load.cached_tokens
    latency, pace = body["latency"], body["throughput"]
    assert {name: latency[name]["count"] for name in ("ttft", "e2e", "queue", "tpot", "itl")} == {
        "ttft": 4,
        "e2e": 4,
        "queue": 4,
        "tpot": 3,
        "itl": written - 4,
    }
    for times in (latency["ttft"], latency["itl"]):
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] < 60
    assert latency["ttft"]["p50"] <= latency["e2e"]["p50"] * 1.04
    assert body["totals"]["requests"] == 4
    assert pace["generated_tokens_per_second"] * 8 <= written <= pace["generated_tokens_per_second"] * 10
    assert pace["prompt_tokens_per_second"] * 8 <= read <= pace["prompt_tokens_per_second"] * 10

    def history():
        return running.client().get("/status.json").json()["history"]

    until(lambda: sum(history()["generated_tokens_per_second"]) * 2 == written)
    assert sum(history()["prompt_tokens_per_second"]) * history()["seconds"] == read
    assert len(history()["prompt_tokens_per_second"]) == 90


def test_whoever_leaves_is_counted_as_cancelled_and_a_broken_answer_as_an_error(serve, until):
    running = serve(fails=lambda request: request.params.seed == 13)
    assert running.chat(seed=13).status_code == 500
    running.engine.held.set()
    with running.client().stream("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "«x»"}], "stream": True}):
        until(lambda: running.service.models[0].running)
    until(lambda: not running.service.models[0].running)
    running.engine.held.clear()
    until(lambda: running.client().get("/status.json").json()["totals"]["cancelled"] == 1)
    totals = running.client().get("/status.json").json()["totals"]
    assert (totals["requests"], totals["errors"]) == (2, 1)


def test_what_was_loaded_is_told_as_numbers(serve):
    """Parameters, threads and the memory plan, as an engine that has loaded a model tells them."""
    running = serve(models=("one", "two"))
    first = running.service.models[0]
    figures = {"parameters": 100, "active_parameters": 30, "dtype": "float32", "threads": 2}
    memory = {"mapped weights": 5, "weights": 7, "work": 1, "cache": 9}
    first.info = msgspec.structs.replace(first.info, memory=memory, cpus=(0, 1), **figures)
    body = running.client().get("/status.json").json()
    told, cold = body["models"]
    assert {name: told[name] for name in figures} == figures
    assert (told["cores"], told["plan"]) == ([0, 1], memory)
    assert body["memory"] == {"weights_bytes": 12, "cache_bytes": 9}
    assert (cold["parameters"], cold["threads"], cold["cores"], cold["plan"]) == (None, None, [], {})
