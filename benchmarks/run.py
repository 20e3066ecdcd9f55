"""Speed and memory side by side: every peer on the same checkpoint, in turn, in one run; prints a Markdown table with ratios.

python benchmarks/run.py [--shape 0.3B] [--dtypes float32,bfloat16] [--batches 1,8] [--rounds 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ernie45.config import Environment
from ernie45.models.compute import cpu_has_bfloat16
from ernie45.models.counts import count_parameters
from ernie45.recipes.bench.limits import measure_limits
from ernie45.recipes.bench.make import MakeConfig, every_shape, make

HERE = Path(__file__).parent
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s", "peak_mb_loaded", "peak_mb")


def run_peer(peer: str, folder: Path, dtype: str, batch: int, options: list[str]) -> dict[str, Any]:
    """One peer in a process of its own. Ends the run with the peer's own words when it fails."""
    command = [sys.executable, str(HERE / "peer.py"), peer, str(folder), dtype, str(batch), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several rounds as one row of medians."""
    return rows[0] | {name: statistics.median(row[name] for row in rows) for name in FIGURES}


def table(results: list[dict[str, Any]], limits: dict[str, Any], parameters: int) -> str:
    """Markdown: a row per peer, and ours as a ratio to transformers in the same type and batch, and to the memory limit."""
    lines = [
        "| peer | type | batch | prefill, tok/s | decode, tok/s | decode / limit | load, s | peak, MB | prefill ratio | decode ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    theirs = {(r["dtype"], r["batch"]): r for r in results if r["peer"] == "transformers"}
    for r in results:
        limit = limits["read_gb_per_s"] * 1e9 / (parameters * 2) * r["batch"]
        other = theirs.get((r["dtype"], r["batch"]))
        ratios = ["", ""]
        if r["peer"] == "ernie45" and other:
            ratios = [f"{r[name] / other[name]:.2f}x" for name in FIGURES[:2]]
        share = f"{r['decode_tokens_per_s'] / limit:.0%}" if r["batch"] == 1 else ""
        lines.append(
            f"| {r['peer']} {r['version']} | {r['dtype']} | {r['batch']} | {r['prefill_tokens_per_s']:.0f} "
            f"| {r['decode_tokens_per_s']:.1f} | {share} | {r['load_s']:.2f} | {r['peak_mb']:.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the machine, then every peer in turn, and print the table; the raw figures go to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.3B")
    parser.add_argument("--dtypes", default="float32,bfloat16" if cpu_has_bfloat16() else "float32")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--peers", default="ernie45,transformers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args, options = parser.parse_known_args()
    results_folder = HERE / "results"
    folder = results_folder / "checkpoints" / args.shape
    if not folder.exists():
        make(MakeConfig(shape=args.shape, out=folder), Environment.read())
    limits = asdict(measure_limits(args.threads))
    results = []
    for dtype in args.dtypes.split(","):
        for batch in map(int, args.batches.split(",")):
            rounds: dict[str, list[dict[str, Any]]] = {}
            for _ in range(args.rounds):
                for peer in args.peers.split(","):
                    row = run_peer(peer, folder, dtype, batch, ["--threads", str(args.threads), *options])
                    rounds.setdefault(peer, []).append(row)
                    print(
                        f"{peer} {dtype} batch {batch}: {row['prefill_tokens_per_s']:.0f} / {row['decode_tokens_per_s']:.1f}",
                        file=sys.stderr,
                    )
            results += [median_of(rows) for rows in rounds.values()]
    text = table(results, limits, count_parameters(every_shape()[args.shape]).active_with_head)
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    (results_folder / f"{stamp}.json").write_text(json.dumps({"limits": limits, "shape": args.shape, "results": results}, indent=1))
    print(f"{args.shape} shape, random weights, {limits['cpu']}, {args.threads} threads, torch {limits['torch']}")
    print(
        f"machine: {limits['read_gb_per_s']:.1f} GB/s read, float32 {limits['float32_gflops']:.0f} GFLOP/s, "
        f"bfloat16 {limits['bfloat16_gflops']:.0f} GFLOP/s\n\n{text}"
    )


if __name__ == "__main__":
    main()
