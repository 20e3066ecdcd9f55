"""`ernie bench serve` against a live server, and against servers that misbehave."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest
from PIL import Image

from ernie45.cli import main
from ernie45.recipes.bench.figures import figures, percentile
from ernie45.recipes.bench.load import Pace, Sample

SMALL = ["--prompt-tokens", "20", "--output-tokens", "8", "--vocabulary", "250"]


def bench(url, capsys, *arguments):
    code = main(["bench", "serve", url, "--json", *SMALL, *arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_so_many_at_a_time(shared, capsys, tmp_path):
    picture = tmp_path / "run.png"
    code, report, _ = bench(
        shared.url, capsys, "--requests", "12", "--concurrency", "3", "--slo", "ttft=60000", "e2e=60000",
        "--out", str(tmp_path / "run.json"), "--picture", str(picture),
    )  # fmt: skip
    assert code == 0
    assert (report["model"], report["requests"], report["succeeded"], report["errors"]) == ("fake", 12, 12, {})
    assert report["prompt_tokens"] == 12 * 20
    assert report["output_tokens"] == 12 * 8
    assert report["goodput"]["share"] == 1.0
    for kind in ("ttft", "tpot", "itl", "e2e"):
        found = report[f"{kind}_ms"]
        assert 0 <= found["p50"] <= found["p90"] <= found["p99"] <= found["max"]
    samples = json.loads((tmp_path / "run.json").read_text())["samples"]
    assert len(samples) == 12
    assert all(sample["due"] <= sample["first"] <= sample["end"] for sample in samples)
    with Image.open(picture) as image:
        assert image.size == (1280, 768)
        assert len(image.getcolors(1 << 20)) > 4


def test_chat_at_a_rate_with_a_dataset(shared, capsys, tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "«one»", "output_tokens": 2}\n\n{"messages": [{"role": "user", "content": "«two words»"}]}\n'
    )
    code, report, _ = bench(
        shared.url, capsys, "--route", "chat", "--requests", "6", "--rate", "200", "--ramp", "0.1", "--respect-eos",
        "--dataset", str(tmp_path / "d.jsonl"), "--slo", "e2e=0.0001",
    )  # fmt: skip
    assert code == 0
    assert report["succeeded"] == 6
    assert report["goodput"]["share"] == 0.0


def test_a_key_and_a_shared_prefix(serve, capsys, tmp_path):
    running = serve(keys=("me:key-for-the-bench",))
    code, _, err = bench(running.url, capsys)
    assert code == 2
    assert "answers 401" in err
    (tmp_path / "key").write_text("key-for-the-bench\n")
    code, report, _ = bench(running.url, capsys, "--key-file", str(tmp_path / "key"), "--requests", "2", "--shared-prefix", "16")
    assert code == 0
    prompts = [request.prompt for request in running.engine.submitted[-2:]]
    assert prompts[0][:16] == prompts[1][:16]
    assert prompts[0][16:] != prompts[1][16:]
    assert report["succeeded"] == 2


def test_refusals_are_counted_and_the_run_fails(shared, capsys):
    code, report, _ = bench(shared.url, capsys, "--requests", "3", "--warm-up", "0", "--model", "nobody")
    assert code == 1
    assert report["errors"] == {"status 404": 3}
    assert report["ttft_ms"] is None
    assert main(["bench", "serve", shared.url, "--requests", "1", "--warm-up", "0", "--model", "nobody"]) == 1
    assert "failed: 1 with status 404" in capsys.readouterr().out


@contextmanager
def talking(answer):
    """A server that says the same bytes to everyone and hangs up."""
    state = {}

    async def serve(started):
        async def handle(reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
            await reader.readexactly(length)  # what is unread when the socket closes resets the connection: another error
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        state["port"], state["stop"], state["loop"] = server.sockets[0].getsockname()[1], asyncio.Event(), asyncio.get_running_loop()
        started.set()
        await state["stop"].wait()
        server.close()

    started = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(started)))
    thread.start()
    assert started.wait(10)
    yield f"http://127.0.0.1:{state['port']}"
    state["loop"].call_soon_threadsafe(state["stop"].set)
    thread.join(10)


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", "RemoteProtocolError"),
        (b"not http at all\r\n\r\n", "RemoteProtocolError"),
        (EVENTS + b'data: {"choices": [{"text": "a"}]}\n\n', "cut short"),
        (EVENTS + b"data: {nonsense\n\ndata: [DONE]\n\n", "JSONDecodeError"),
        (EVENTS + b'data: {"error": {"code": "broken"}}\n\ndata: [DONE]\n\n', "in the stream: broken"),
    ],
)
def test_servers_that_misbehave_are_errors_by_name(capsys, answer, error):
    with talking(answer) as url:
        code, report, _ = bench(url, capsys, "--model", "m", "--requests", "2", "--warm-up", "0")
    assert code == 1
    assert report["errors"] == {error: 2}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ftp://x"], "is no address"),
        (["http://127.0.0.1:9", "--requests", "1"], "no server answers"),
        (["--rate", "0"], "--rate is 0.0"),
        (["--spread", "1"], "--spread is 1.0"),
        (["--slo", "speed=3"], "is no goal"),
        (["--vocabulary", "3"], "--vocabulary is 3"),
        (["--timeout", "nan"], "--timeout is nan"),
    ],
)
def test_a_mistake_is_said(capsys, arguments, says):
    assert main(["bench", "serve", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1: no JSON"),
        ('{"a": 1}', "needs `prompt`"),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens is 0"),
        ("\n", "is empty"),
    ],
)
def test_a_dataset_is_read_strictly(shared, capsys, tmp_path, text, says):
    (tmp_path / "d.jsonl").write_text(text)
    assert main(["bench", "serve", shared.url, "--dataset", str(tmp_path / "d.jsonl")]) == 2
    assert says in capsys.readouterr().err


def test_the_pace_keeps_its_rate_and_rises_to_it():
    dues = Pace(rate=50.0, places=1, ramp=0.0, seed=3).dues(5000)
    assert dues == sorted(dues)
    assert dues[-1] == pytest.approx(100, rel=0.05)
    assert Pace(rate=50.0, places=1, ramp=10.0, seed=3).dues(5000)[-1] == pytest.approx(105, rel=0.05)


def test_figures_by_hand():
    samples = [
        Sample(due=0.0, sent=0.5, first=1.0, end=2.0, pieces=[1.0, 1.5, 2.0], prompt_tokens=4, output_tokens=3),
        Sample(due=1.0, sent=1.0, first=2.0, end=4.0, pieces=[2.0, 4.0], prompt_tokens=4, output_tokens=2),
        Sample(due=1.0, sent=1.0, end=5.0, error="ReadTimeout"),
    ]
    report = figures(samples, {"ttft": 1000.0, "itl": 1000.0})
    assert report["seconds"] == 5.0
    assert report["output_tokens_per_s"] == 1.0
    assert report["ttft_ms"]["mean"] == 1000.0
    assert (report["tpot_ms"]["p50"], report["tpot_ms"]["max"]) == (500.0, 2000.0)
    assert (report["itl_ms"]["p50"], report["itl_ms"]["max"]) == (500.0, 2000.0)
    assert report["goodput"] == {"goals_ms": {"ttft": 1000.0, "itl": 1000.0}, "share": pytest.approx(1 / 3), "requests_per_s": 0.2}
    assert [percentile([1, 2, 3, 4], share) for share in (1, 25, 50, 51, 99, 100)] == [1, 1, 2, 3, 4, 4]
