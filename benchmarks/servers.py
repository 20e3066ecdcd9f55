"""Servers side by side over HTTP: this one, llama.cpp's and vLLM's, in turn and in one run; prints a Markdown table.

python benchmarks/servers.py PEERS --folder FOLDER [--gguf FILE] [--engines ernie45,llama.cpp,vllm] [--clients 1,4,16] [--rounds 1]

PEERS is the folder that `benchmarks/peers.py` filled. FOLDER is what this project serves, and vLLM too when it is among the engines (it
needs a whole folder with a tokenizer, such as the starter); FILE the same weights for llama.cpp (`ernie export`). Every server gets the
same number of threads and the same load: prompts of 256 random tokens, 128 tokens of answer, so many clients that each ask again when
answered (`ernie bench serve`). A server is started anew for each number of clients, with room for just so many, as llama.cpp likes best.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def command(engine: str, args: argparse.Namespace, port: int, clients: int) -> list[str | Path]:
    """How each server is started; `length` is what one request needs."""
    length, threads, at = str(args.prompt + args.output + 16), str(args.threads), ["--port", str(port)]
    if engine == "ernie45":
        room = ["--engine.threads", threads, "--engine.max-length", length, "--log", "off"]
        return [sys.executable, "-m", "ernie45", "serve", args.folder, *at, *room, *args.ours.split()]
    if engine == "llama.cpp":
        room = ["-np", str(clients), "-c", str(clients * int(length)), "-b", "2048", "-ub", "512", "--cache-ram", "0"]
        return [args.peers / "llama.cpp/bin/llama-server", "-m", args.gguf, *at, "-t", threads, "-tb", threads, *room, *args.llama.split()]
    room = ["--max-model-len", length, "--max-num-seqs", str(clients), "--dtype", args.dtype, "--no-enable-prefix-caching"]
    return [args.peers / "vllm/bin/vllm", "serve", args.folder, *at, "--served-model-name", "m", *room, *args.vllm.split()]


def wait(url: str, server: subprocess.Popen[bytes], limit: float, model: str) -> float:
    """Seconds until the server answers four tokens; raises SystemExit when it ends or is too slow."""
    start, body = time.monotonic(), {"model": model, "prompt": [300, 301, 302], "max_tokens": 4, "temperature": 0}
    while time.monotonic() - start < limit:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}; its words are in server.log")
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200:
                return time.monotonic() - start
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"no answer within {limit:.0f} s; the server's words are in server.log")


def measure(engine: str, args: argparse.Namespace, clients: int) -> dict[str, float]:
    """One server under one load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, model = f"http://127.0.0.1:{port}", args.folder.name if engine == "ernie45" else "m"
    with Path("server.log").open("wb") as log:
        start = command(engine, args, port, clients)
        server = subprocess.Popen(start, stdout=log, stderr=log, env=os.environ | VLLM_ENVIRONMENT, start_new_session=True)
    try:
        ready = wait(url, server, args.patience, model)
        # no warm-up: its prompts are the measured ones, which would then be in the servers' prefix caches
        sizes = {"--concurrency": clients, "--requests": max(2, args.repeat * clients), "--warm-up": 0}
        sizes |= {"--prompt-tokens": args.prompt, "--output-tokens": args.output}
        options = [str(word) for pair in sizes.items() for word in pair]
        load = [sys.executable, "-m", "ernie45", "bench", "serve", url, "--model", model, *options, "--json"]
        done = subprocess.run(load, capture_output=True, text=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    if done.returncode:
        sys.exit(f"{engine}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    if found["errors"]:
        sys.exit(f"{engine}: {found['errors']}")
    return {"rate": found["output_tokens_per_s"], "ttft": found["ttft_ms"]["p50"], "tpot": found["tpot_ms"]["p50"], "ready": ready}


def main() -> None:
    """Every engine in turn for each number of clients; medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--engines", default="ernie45,llama.cpp")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--dtype", default="bfloat16", help="what vLLM computes in")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds a server may take to start")
    for engine in ("ours", "llama", "vllm"):
        parser.add_argument(f"--{engine}", default="", help="more options for that server, in one word")
    for name, default in (("prompt", 256), ("output", 128), ("rounds", 1), ("threads", 2), ("repeat", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print("| server | clients | tokens/s | first token, ms | per token, ms | ours / theirs | ready, s |\n|---|---|---|---|---|---|---|")
    for clients in map(int, args.clients.split(",")):
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for engine in args.engines.split(","):
                rows.setdefault(engine, []).append(measure(engine, args, clients))
        medians = {engine: {name: statistics.median(row[name] for row in found) for name in found[0]} for engine, found in rows.items()}
        for engine, m in medians.items():
            ours = medians.get("ernie45")
            ratio = f"{ours['rate'] / m['rate']:.2f}x" if ours and engine != "ernie45" else ""
            print(
                f"| {engine} | {clients} | {m['rate']:.1f} | {m['ttft']:.0f} | {m['tpot']:.1f} | {ratio} | {m['ready']:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
