"""What HTTP and the front cost a decode step: the same sequences through the bare engine and through the server, in turns.

    ernie bench make 0.3B --scheme w4a8 --out shape-0.3B-w4a8
    python benchmarks/overhead.py shape-0.3B-w4a8 [--sequences 1 4 16] [--tokens 96] [--threads 2] [--rounds 3]

bare    a loop over `Engine.step` in a process of its own: scheduler, cache and sampler, no text and no messages
server  `ernie serve` with the same settings; each sequence is a streamed completion on a connection of its own

Both sides have their model loaded the whole time and idle while the other runs. All sequences have one prompt that both know already, so
that a round is S x N decoded tokens and next to nothing else. Its time is from the moment when every answer has begun to the end of the
last: N - 1 decode steps, without what it costs to take a request in. The client is one thread that reads sockets and counts: what it takes
of the processor is told, and is in the server's time, as is its network stack.

Needs psutil, Linux. Progress goes to standard error, the result as JSON to standard output.
"""

import argparse
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.request import urlopen

import psutil

PROGRAM = "import sys; from ernie45.cli import main; sys.exit(main())"
PROMPT = [5 + number % 500 for number in range(65)]  # two pages of 32 that are shared, and one token to begin with
BEGIN, END = b"data: {", b"data: [DONE]"


@dataclass(frozen=True)
class Round:
    """One round of one side; seconds. steps: of the engine; engine, front, client: processor time, where there is such a process."""

    side: str
    sequences: int
    seconds: float
    steps: int
    engine: float
    front: float = 0.0
    client: float = 0.0


# ---- the bare side, in a process of its own


def bare(folder: str, threads: int, most: int) -> None:
    """Reads `sequences tokens` a line, and answers each with a `Round`."""
    from ernie45.config import shorten_thread_waits

    shorten_thread_waits()
    import torch

    from ernie45.engine.core import Engine, EngineConfig
    from ernie45.engine.request import Request, SamplingParams
    from ernie45.models.load import load

    torch.set_num_threads(threads)
    engine = Engine(load(folder, mtp=False, compact=True).decoder, EngineConfig(max_running=most, num_pages=512, max_length=512))
    print("ready", flush=True)
    for line in sys.stdin:
        sequences, tokens = map(int, line.split())
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        used, steps, begun = time.process_time(), 0, set()
        for number in range(sequences):
            engine.submit(Request(id=str(number), prompt=tuple(PROMPT), params=params, eos_ids=()))
        while len(begun) < sequences:
            begun |= {output.request_id for output in engine.step() if output.tokens}
        began = time.perf_counter()
        while not engine.idle:
            engine.step()
            steps += 1
        print(json.dumps(asdict(Round("bare", sequences, time.perf_counter() - began, steps, time.process_time() - used))), flush=True)


class Bare:
    """The other end of `bare`."""

    def __init__(self, folder: str, threads: int, most: int) -> None:
        command = [sys.executable, __file__, folder, "--bare", "--threads", str(threads), "--sequences", str(most)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def round(self, sequences: int, tokens: int) -> Round:
        """One round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{sequences} {tokens}\n")
        self._process.stdin.flush()
        return Round(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


# ---- the server's side


class Server:
    """`ernie serve` on a port of its own."""

    def __init__(self, folder: str, threads: int, most: int) -> None:
        command = [sys.executable, "-c", PROGRAM, "serve", folder, "--port", "0", "--storage", "off", "--log", "off"]
        command += ["--engine.threads", str(threads), "--engine.max-running", str(most)]
        command += ["--engine.num-pages", "512", "--engine.max-length", "512"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        told = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            told.append(line)
            if line.startswith("ready:"):
                break
        else:
            sys.exit("the server did not start:\n" + "".join(told))
        self._port = int(re.search(r"http://\S+:(\d+)", told[-1])[1])
        self._front = psutil.Process(self._process.pid)
        (self._engine,) = self._front.children()

    def round(self, sequences: int, tokens: int) -> Round:
        """One round."""
        asked = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        links = [socket.create_connection(("127.0.0.1", self._port)) for _ in range(sequences)]
        engine, front, client, steps = _used(self._engine), _used(self._front), time.process_time(), self._steps()
        for link in links:
            link.sendall(head.encode() + body)
        seconds = read_all(links)
        client = time.process_time() - client
        for link in links:
            link.close()
        used = _used(self._engine) - engine, _used(self._front) - front
        return Round("server", sequences, seconds, self._steps() - steps, *used, client)

    def _steps(self) -> int:
        with urlopen(f"http://127.0.0.1:{self._port}/metrics") as page:
            found = re.search(r"^ernie_engine_steps_total\S* (\S+)", page.read().decode(), re.MULTILINE)
        return int(float(found[1])) if found else 0

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.communicate()


def read_all(links: list[socket.socket]) -> float:
    """Until each has said its last event; seconds since all had said their first."""
    tails = dict.fromkeys(links, b"")
    waiting, began = set(links), 0.0
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link, selectors.EVENT_READ)
        while tails:
            for key, _ in selector.select():
                link = key.fileobj
                data = link.recv(1 << 16)
                assert data, "the server hung up"
                if link in waiting and BEGIN in data:
                    waiting.discard(link)
                    began = time.perf_counter()
                tails[link] = tails[link][-len(END) :] + data
                if END in tails[link]:
                    selector.unregister(link)
                    del tails[link]
    return time.perf_counter() - began


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


# ---- both


def summary(rounds: list[Round], tokens: int) -> list[dict[str, Any]]:
    """A line for each number of sequences: the quickest round of each side, since what disturbs only adds, and what a step costs more."""
    lines = []
    for sequences in sorted({each.sequences for each in rounds}):
        sides = {side: [r for r in rounds if (r.side, r.sequences) == (side, sequences)] for side in ("bare", "server")}
        bare_s, server_s = (min(r.seconds for r in sides[side]) for side in ("bare", "server"))
        steps = sum(r.steps for r in sides["server"])
        line = {
            "sequences": sequences,
            "bare_tokens_per_s": sequences * (tokens - 1) / bare_s,
            "server_tokens_per_s": sequences * (tokens - 1) / server_s,
            "bare_step_ms": 1000 * bare_s / (tokens - 1),
            "difference_per_step_ms": 1000 * (server_s - bare_s) / (tokens - 1),
            "overhead": server_s / bare_s - 1,
            "overhead_of_medians": statistics.median(r.seconds for r in sides["server"])
            / statistics.median(r.seconds for r in sides["bare"])
            - 1,
            "front_cpu_ms_per_step": 1000 * sum(r.front for r in sides["server"]) / steps,
            "client_cpu_ms_per_step": 1000 * sum(r.client for r in sides["server"]) / steps,
        }
        lines.append({name: round(value, 4) for name, value in line.items()})
    return lines


def main() -> None:
    """Runs both sides in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model's folder")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16], help="at the same time")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--threads", type=int, default=2, help="of the model, on both sides")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, after one that is not counted")
    parser.add_argument("--bare", action="store_true", help="be the bare side")
    args = parser.parse_args()
    if args.bare:
        bare(args.folder, args.threads, max(args.sequences))
        return
    sides = [Bare(args.folder, args.threads, max(args.sequences)), Server(args.folder, args.threads, max(args.sequences))]
    rounds: list[Round] = []
    try:
        for side in sides:
            side.round(max(args.sequences), 8)
        for number in range(args.rounds):
            for sequences in args.sequences:
                for side in sides if number % 2 else sides[::-1]:
                    rounds.append(side.round(sequences, args.tokens))
                    print(rounds[-1], file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.close()
    print(json.dumps({"tokens": args.tokens, "threads": args.threads, "results": summary(rounds, args.tokens)}, indent=1))


if __name__ == "__main__":
    main()
