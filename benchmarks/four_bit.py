"""Four-bit weights side by side: this engine and llama.cpp, in turn and in one run; prints a Markdown table.

python benchmarks/four_bit.py PACKED_FOLDER GGUF [--prompt 512] [--output 64] [--batches 1,16] [--rounds 2] [--threads 2]

PACKED_FOLDER comes from `ernie bench make SHAPE --scheme w4a8`, GGUF from `ernie export` of the same shape with `--type q4_0`. llama.cpp is
driven in process, by the package xllamacpp, whose wheel is built for AVX2 alone: slower than a build for this machine would be.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path


def run_ours(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second through the engine: scheduler, paged cache and sampler included."""
    import torch

    from benchmarks.peer import Ernie45

    torch.set_num_threads(args.threads)
    prompts = _prompts(args.batch, args.prompt)
    peer = Ernie45(folder, "auto", args.batch)
    peer.run([prompt[:16] for prompt in prompts], 4)
    runs = [peer.run(prompts, args.output) for _ in range(3)]
    return {
        "prefill": args.batch * args.prompt / statistics.median(first for first, _ in runs),
        "decode": args.batch * args.output / statistics.median(rest for _, rest in runs),
    }


def run_llama_cpp(file: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by llama.cpp's own clocks; of several sequences all answered tokens over the whole time, prompts included."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), args.batch * (args.prompt + args.output + 16), args.batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.n_batch = params.n_ubatch = 512
    params.warmup, params.cache_ram_mib = True, 0
    server = xllamacpp.Server(params)
    found: list[dict[str, float]] = [{} for _ in range(args.batch)]

    def ask(place: int, prompt: list[int], output: int) -> None:
        body = {"prompt": prompt, "n_predict": output, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        found[place] = server.handle_completions(body)["timings"]

    def all_at_once(prompts: list[list[int]], output: int) -> dict[str, float]:
        start = time.perf_counter()
        threads = [threading.Thread(target=ask, args=(i, prompt, output)) for i, prompt in enumerate(prompts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(prompts) == 1:
            return {"prefill": found[0]["prompt_per_second"], "decode": found[0]["predicted_per_second"]}
        seconds = time.perf_counter() - start
        return {"prefill": float("nan"), "decode": len(prompts) * output / seconds}

    prompts = _prompts(args.batch, args.prompt)
    all_at_once([prompt[:16] for prompt in prompts], 4)
    runs = [all_at_once(prompts, args.output) for _ in range(3)]
    return {name: statistics.median(run[name] for run in runs) for name in ("prefill", "decode")}


def _prompts(count: int, length: int) -> list[list[int]]:
    chosen = random.Random(1)
    return [[chosen.randrange(300, 50_000) for _ in range(length)] for _ in range(count)]


def main() -> None:
    """Both sides in processes of their own, in turn; medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    for name, default in (("prompt", 512), ("output", 64), ("rounds", 2), ("threads", 2), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--side", choices=["ernie45", "llama.cpp"])
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_ours(args.folder, args) if args.side == "ernie45" else run_llama_cpp(args.gguf, args)))
        return
    print("| engine | sequences | prefill, tok/s | decode, tok/s |\n|---|---|---|---|")
    for batch in map(int, args.batches.split(",")):
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for side in ("ernie45", "llama.cpp"):
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--batch", str(batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
                rows.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
        for side, found in rows.items():
            prefill, decode = (statistics.median(row[name] for row in found) for name in ("prefill", "decode"))
            print(f"| {side} | {batch} | {prefill:.0f} | {decode:.1f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
