"""Minutes of mixed load on a server of its own, with clients that leave and cancel; then: is everything as it was at the start?

    python benchmarks/soak.py [--minutes 10] [--model fake] [--clients 12] [--growth 64] [--seed 1] [--patience 60]

fake   an engine without weights: a hundred times as many requests a minute as with any real model, which --model takes too.

Clients ask for chats, completions, responses, messages, embeddings and shapes, whole and streamed; send broken bodies, half requests and
too much; read slowly, hang up at any moment, cancel by name. Ends with 0 only if

- no answer had the status 500, no stream held an error of the server, and the log has no error,
- each time all clients rest: nothing runs or waits, and all pages are free (an idle engine that cannot prove it ends itself),
- open files, connections and threads of the server and of its engine are as many as after the first rest, up to 2,
- and resident memory, both processes together, has grown by at most --growth megabytes since the first rest.

Needs httpx and psutil, Linux. A line per rest goes to standard error, the result as JSON to standard output.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

PROGRAM = "import sys; from ernie45.cli import main; sys.exit(main())"
SETTINGS = ["--engine.threads", "1", "--engine.max-length", "1024", "--limits.read-seconds", "3", "--limits.write-seconds", "5"]
SMALL_CACHE = ["--engine.num-pages", "96"]  # full before the first rest: a cache that fills is memory that grows
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
SPARE = 2  # a keep-alive connection or a thread of a pool more or less is no leak
FIRST_REST = 0.15  # of the time: by then every pool and cache has been used


@dataclass
class Seen:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    patience: float = 60.0  # seconds for an answer


@dataclass(frozen=True)
class Rest:
    """The server while nobody asks for anything."""

    seconds: int
    requests: int
    files: int
    connections: int
    threads: int
    megabytes: float


def start(model: str) -> tuple[subprocess.Popen[str], str]:
    """A server, ready, and its address."""
    command = [sys.executable, "-c", PROGRAM, "serve", model, "--port", "0", "--storage", "off", *SETTINGS]
    command += SMALL_CACHE if model != "fake" else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith("ready:"):
            return process, re.search(r"http://\S+:\d+", "".join(told))[0]
    sys.exit("the server did not start:\n" + "".join(told))


def question(dice: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """A request that is right."""
    words = " ".join(dice.choice(["red", "green", "blue", "one", "two"]) for _ in range(dice.randrange(1, 60)))
    chat = {"messages": [{"role": "user", "content": words}]}
    short = {"max_tokens": dice.randrange(1, 40), "temperature": dice.choice([0, 1]), "stream": dice.random() < 0.6}
    kinds = {
        "/v1/chat/completions": chat | short | {"n": dice.choice([1, 1, 4])},
        "/v1/completions": {"prompt": [words, words[:9]], **short},
        "/v1/messages": chat | {"model": model, "max_tokens": short["max_tokens"], "stream": short["stream"]},
        "/v1/responses": {"input": words, "max_output_tokens": 16 + short["max_tokens"], "stream": short["stream"]},
        "/v1/embeddings": {"input": [words, "a"]},
        "/tokenize": {"prompt": words},
    }
    path = dice.choice(list(kinds))
    body = kinds[path]
    if path == "/v1/chat/completions" and dice.random() < 0.25:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}, "n": 1}
    return path, body


def nonsense(dice: random.Random) -> bytes:
    """A body that is wrong."""
    return dice.choice(
        [b"", b"[]", b"null", b'"a"', b'{"messages": NaN}', b'{"messages": [', b"\xff\xfe", b'{"prompt": 1e400}', b"[" * 500]
        + [
            json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": value}).encode()
            for value in (-1, "x", 10**30, [], {})
        ]
        + [dice.randbytes(dice.randrange(200))]
    )


async def visit(client: httpx.AsyncClient, model: str, dice: random.Random, seen: Seen) -> None:
    """One client that asks and does as clients do."""
    path, body = question(dice, model)
    manner = dice.choices(["stays", "leaves", "slow", "hurry", "cancels", "nonsense", "half"], [8, 4, 1, 3, 2, 2, 1])[0]
    if manner == "half":
        await half(client, dice, seen)
        return
    content = nonsense(dice) if manner == "nonsense" else json.dumps(body).encode()
    patience = dice.choice([0.0, 0.005, 0.05]) if manner == "hurry" else seen.patience
    try:
        async with (
            asyncio.timeout(patience),
            client.stream("POST", path, content=content, headers={"content-type": "application/json"}) as answer,
        ):
            seen.statuses[str(answer.status_code)] += 1
            text = b""
            async for part in answer.aiter_bytes():
                text += part
                if manner == "leaves":
                    seen.left += 1
                    return
                if manner == "slow":
                    await asyncio.sleep(0.05)
                if manner == "cancels" and (found := re.search(rb'"id":\s?"(resp_\w+)"', text)):
                    await client.post(f"/v1/responses/{found[1].decode()}/cancel")
                    manner = "stays"
            if b"engine_error" in text or b"internal_error" in text or answer.status_code == 500:
                seen.wrong.append(f"{path} {content[:200]!r}: {text[-300:]!r}")
    except (httpx.HTTPError, TimeoutError) as error:
        seen.left += 1
        if manner in ("stays", "slow"):
            seen.wrong.append(f"{path}: {type(error).__name__} {error}")


async def half(client: httpx.AsyncClient, dice: random.Random, seen: Seen) -> None:
    """A request that stops in the middle, and then the end of the line."""
    place = urlsplit(str(client.base_url))
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n" + b'{"prompt": '
    )
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(whole[: dice.randrange(len(whole))])
        await asyncio.sleep(dice.choice([0, 0.1, 4]))
        writer.close()
    seen.left += 1


async def look(client: httpx.AsyncClient, process: psutil.Process, seen: Seen, began: float) -> Rest:
    """Waits until nothing runs or waits, and looks. Adds to `seen.wrong` when that takes more than a minute."""
    end = time.monotonic() + 60
    while True:
        model = (await client.get("/status.json")).json()["models"][0]
        if model["running"] == model["waiting"] == 0 and model["pages"] and model["pages"]["free"] == model["pages"]["all"]:
            break
        if time.monotonic() > end:
            seen.wrong.append(f"not at rest: {model}")
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(6)  # half requests are given up, connections close
    family = [process, *process.children(recursive=True)]
    return Rest(
        seconds=round(time.monotonic() - began),
        requests=seen.statuses.total() + seen.left,
        files=sum(one.num_fds() for one in family),
        connections=len(process.net_connections("tcp")),
        threads=sum(one.num_threads() for one in family),
        megabytes=round(sum(one.memory_info().rss for one in family) / 1e6, 1),
    )


async def soak(url: str, pid: int, minutes: float, clients: int, seed: int, patience: float) -> tuple[list[Rest], Seen]:
    """Load and rests in turn: the first rest early, eight later ones."""
    dice, seen, process = random.Random(seed), Seen(patience=patience), psutil.Process(pid)
    began, rests = time.monotonic(), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
    until = [minutes * 60 * (FIRST_REST + (1 - FIRST_REST) * step / 8) for step in range(9)]
    for end in until:
        async with httpx.AsyncClient(base_url=url, timeout=patience) as client:

            async def come(client: httpx.AsyncClient = client, end: float = end) -> None:
                while time.monotonic() - began < end:
                    await visit(client, model, dice, seen)

            await asyncio.gather(*(come() for _ in range(clients)))
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            rests.append(await look(client, process, seen, began))
        print(rests[-1], file=sys.stderr, flush=True)
    return rests, seen


def judged(rests: list[Rest], seen: Seen, log: list[str], growth: float) -> list[str]:
    """What is wrong, in words; empty when all is well."""
    first, last = rests[0], rests[-1]
    events = [json.loads(line) for line in log if line.startswith("{")]
    wrong = seen.wrong + [f"in the log: {event}" for event in events if event["event"] != "unload"]
    wrong += [f"{name} grew from {getattr(first, name)} to {getattr(last, name)}" for name in ("files", "connections", "threads")
              if getattr(last, name) > getattr(first, name) + SPARE]  # fmt: skip
    if last.megabytes > first.megabytes + growth:
        wrong.append(f"memory grew from {first.megabytes} to {last.megabytes} MB")
    return wrong


def main() -> None:
    """Runs it, prints the result, and ends with 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="fake", help="'fake', or what `ernie serve` takes")
    parser.add_argument("--clients", type=int, default=12, help="at the same time")
    parser.add_argument("--growth", type=float, default=64, help="megabytes that memory may grow between the first and the last rest")
    parser.add_argument("--patience", type=float, default=60, help="seconds for an answer; more for a real model on a busy machine")
    parser.add_argument("--seed", type=int, default=1, help="of what the clients do")
    args = parser.parse_args()
    process, url = start(args.model)
    log: list[str] = []
    try:
        rests, seen = asyncio.run(watched(process, log, soak(url, process.pid, args.minutes, args.clients, args.seed, args.patience)))
    finally:
        process.terminate()
        process.wait(60)
    wrong = judged(rests, seen, log, args.growth)
    result = {"statuses": dict(seen.statuses), "left": seen.left, "rests": [vars(rest) for rest in rests], "wrong": wrong[:20]}
    print(json.dumps(result, indent=1))
    sys.exit(1 if wrong else 0)


async def watched(process: subprocess.Popen[str], log: list[str], work: Any) -> Any:
    """Runs `work` while the server's log is read, so that its pipe never fills; keeps lines that tell of trouble."""

    def read() -> None:
        assert process.stderr is not None
        log.extend(line for line in process.stderr if '"event": "request"' not in line or '"status": 500' in line)

    reader = asyncio.get_running_loop().run_in_executor(None, read)
    try:
        return await work
    finally:
        process.terminate()
        await reader


if __name__ == "__main__":
    main()
