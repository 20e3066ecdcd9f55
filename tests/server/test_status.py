"""What /status.json says of all models together, in the words that the page reads."""

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
    running.loop.call_soon_threadsafe(running.engine.tell, Chosen(((1, (3, 0, 1)), (2, (2, 2, 0)))))
    until(lambda: running.service.models[0].experts)
    experts = running.client().get("/status.json").json()["experts"]
    assert experts == {"layers": [{"layer": 1, "load": [3, 0, 1]}, {"layer": 2, "load": [2, 2, 0]}]}


def test_throughput_is_over_the_last_seconds(serve, until):
    running = serve()
    running.client().get("/status.json")
    running.chat("«hello, you who read this»")
    pace = running.client().get("/status.json").json()["throughput"]
    assert pace["generated_tokens_per_second"] > 0
    assert pace["prompt_tokens_per_second"] > 0
