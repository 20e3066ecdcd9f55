"""Four-bit weights side by side: this engine, llama.cpp, ik_llama.cpp and OpenVINO, in turn and in one run; prints a Markdown table.

python benchmarks/four_bit.py PACKED_FOLDER GGUF [--qwen3 GGUF] [--peers FOLDER] [--engines ernie45,llama.cpp,ik_llama.cpp,openvino]

PACKED_FOLDER comes from `ernie bench make SHAPE --scheme w4a8` or `ernie quantize`, GGUF from `ernie export` of the same weights with
`--type q4_0`; FOLDER is what `benchmarks/peers.py` filled. llama.cpp and ik_llama.cpp run by their own benchmark programs, in the
settings that suit them best. OpenVINO GenAI reads GGUF files of Qwen3, not of ERNIE: `--qwen3` is GGUF rewritten by
`benchmarks/as_qwen3.py`. Several sequences have prompts of 64 tokens. The read bandwidth is measured behind each of our own runs: where
it moves, figures compare nothing.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

BATCHED_PROMPT = 64
OWN_OPTIONS = {"llama.cpp": ["-fa", "1"], "ik_llama.cpp": ["-fa", "1", "-rtr", "1"]}
BATCHED_OPTIONS = OWN_OPTIONS | {"ik_llama.cpp": ["-fa", "0", "-rtr"]}  # its flash attention ends with an assertion on several sequences
OPENVINO = """
import sys, time, numpy as np, openvino as ov, openvino_genai as g
path, batch, prompt, output, threads, repeats = sys.argv[1], *map(int, sys.argv[2:])
pipe = g.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
random = np.random.default_rng(0)  # no prompt comes twice: what is known of one would be read from the cache
def seconds(n, k):
    ids = ov.Tensor(random.integers(100, 40000, (batch, n)).astype(np.int64))
    c = g.GenerationConfig(); c.max_new_tokens = c.min_new_tokens = k; c.ignore_eos, c.do_sample = True, False
    start = time.perf_counter()
    pipe.generate(g.TokenizedInputs(ids, ov.Tensor(np.ones((batch, n), np.int64))), c)
    return time.perf_counter() - start
seconds(16, 4)
runs = [(first, seconds(prompt, output + 1) - first) for first in (seconds(prompt, 1) for _ in range(repeats))]
print(batch * prompt / sorted(a for a, _ in runs)[repeats // 2], batch * output / sorted(b for _, b in runs)[repeats // 2])
"""


def run_ours(folder: Path, args: argparse.Namespace) -> tuple[float, float, float]:
    """Tokens per second through the engine: scheduler, paged cache and sampler included; then the GB/s that this machine reads."""
    import torch

    from benchmarks.peer import Ernie45
    from ernie45.recipes.bench.limits import read_bandwidth

    torch.set_num_threads(args.threads)
    chosen, length = random.Random(1), _prompt(args)
    prompts = [[chosen.randrange(300, 40_000) for _ in range(length)] for _ in range(args.batch)]
    peer = Ernie45(folder, "auto", args.batch)
    peer.run([prompt[:16] for prompt in prompts], 4)
    runs = [peer.run(prompts, args.output) for _ in range(args.repeats)]
    return (
        args.batch * length / statistics.median(first for first, _ in runs),
        args.batch * args.output / statistics.median(rest for _, rest in runs),
        read_bandwidth(),
    )


def run_llama(engine: str, args: argparse.Namespace) -> tuple[float, float]:
    """llama-bench for one sequence, llama-batched-bench for several: tokens per second by their own clocks."""
    programs, threads = args.peers / engine / "bin", str(args.threads)
    shared = ["-m", args.gguf, "-t", threads, *(OWN_OPTIONS if args.batch == 1 else BATCHED_OPTIONS)[engine]]
    if args.batch == 1:
        sizes = ["-p", str(args.prompt), "-n", str(args.output), "-r", str(args.repeats), "-o", "json"]
        text = re.sub("^WARNING.*\n", "", _output([programs / "llama-bench", *shared, *sizes]), flags=re.MULTILINE)
        found = json.loads(text[text.index("[\n") : text.rindex("]") + 1])
        rates = {bool(row["n_prompt"]): statistics.median(row["samples_ts"]) for row in found}
        return rates[True], rates[False]
    sizes = ["-c", str(args.batch * (BATCHED_PROMPT + args.output + 16)), "-b", "2048", "-ub", "512", "-tb", threads]
    sizes += ["-npp", str(BATCHED_PROMPT), "-ntg", str(args.output), "-npl", str(args.batch)]
    row = re.findall(r"^\|([ \d.|]+)\|$", _output([programs / "llama-batched-bench", *shared, *sizes]), re.MULTILINE)[-1].split("|")
    return float(row[5]), float(row[7])  # S_PP and S_TG


def run_openvino(args: argparse.Namespace) -> tuple[float, float]:
    """OpenVINO GenAI: the time to one token, and how much longer `output` more take."""
    command = [args.peers / "openvino/bin/python", "-c", OPENVINO, args.qwen3 or args.gguf]
    command += [str(number) for number in (args.batch, _prompt(args), args.output, args.threads, args.repeats)]
    prefill, decode = map(float, _output(command).split()[-2:])
    return prefill, decode


def _output(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _prompt(args: argparse.Namespace) -> int:
    return args.prompt if args.batch == 1 else BATCHED_PROMPT


def main() -> None:
    """All sides in processes of their own, in turn; medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--qwen3", type=Path)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--engines", default="ernie45,llama.cpp,ik_llama.cpp")
    for name, default in (("prompt", 512), ("output", 64), ("rounds", 2), ("repeats", 3), ("threads", 2), ("batch", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", default="1,16")
    args = parser.parse_args()
    if args.batch:  # one measurement of ours, in the process that is being measured
        print(*run_ours(args.folder, args))
        return
    print("| engine | sequences | prefill, tok/s | decode, tok/s | prefill ratio | decode ratio |\n|---|---|---|---|---|---|")
    for batch in map(int, args.batches.split(",")):
        args.batch = batch
        engines = args.engines.split(",")
        rates: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
        bandwidths = []
        for _ in range(args.rounds):
            for engine in engines:
                if engine == "ernie45":
                    done = _output([sys.executable, __file__, *sys.argv[1:], "--batch", str(args.batch)])
                    prefill, decode, bandwidth = map(float, done.split()[-3:])
                    rates[engine].append((prefill, decode))
                    bandwidths.append(bandwidth)
                else:
                    rates[engine].append(run_openvino(args) if engine == "openvino" else run_llama(engine, args))
                print(f"{engine}, {batch} at once: {rates[engine][-1]}", file=sys.stderr, flush=True)
        medians = {engine: tuple(statistics.median(column) for column in zip(*found, strict=True)) for engine, found in rates.items()}
        for engine, (prefill, decode) in medians.items():
            ours = medians.get("ernie45")
            ratios = f"{ours[0] / prefill:.2f}x | {ours[1] / decode:.2f}x" if ours and engine != "ernie45" else "|"
            print(f"| {engine} | {args.batch} | {prefill:.0f} | {decode:.1f} | {ratios} |", flush=True)
        if bandwidths:
            print(f"\n{args.batch} at once, read: {', '.join(f'{bandwidth:.1f}' for bandwidth in bandwidths)} GB/s\n", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
