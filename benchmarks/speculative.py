"""Decode with and without drafts, side by side: the same prompts, the same weights, the answers compared token by token.

python benchmarks/speculative.py starter --quantize w4a8
python benchmarks/speculative.py FOLDER --speculative draft --draft-model SMALLER --batch 4
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams

PARAGRAPH = """Anna walked along the river every morning before work. The path was quiet, lined with old willow trees whose branches \
touched the water. She carried a small notebook in which she wrote down the birds she saw: a heron standing in the shallows, two \
kingfishers, a family of ducks. By the time she reached the bridge, the sun had risen above the mill, and the town was beginning to \
wake. The baker opened his shutters and waved to her, as he did every day, and she bought a warm roll for the way."""
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    average = mean(values)
    total = 0
    for value in values:
        total += (value - average) ** 2
    return total / len(values)
"""
PROMPTS = {
    "copy": f"{PARAGRAPH}\n\nThe same text once more:\n\n{PARAGRAPH[:60]}",
    "edit": f"Rewrite the following text exactly as it is, but call the woman Maria instead of Anna:\n\n{PARAGRAPH}",
    "code": f"Add a docstring to each function and print the whole file again:\n\n```python\n{CODE}```",
    "summarise": f"Summarise the following text in your own words:\n\n{PARAGRAPH}",
    "free": "Tell me what makes a good holiday by the sea.",
}


def main() -> None:
    """Prints a line per prompt, and with --json the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantize")
    parser.add_argument("--speculative", default="ngram")
    parser.add_argument("--draft-model")
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument(
        "--batch", type=int, default=1, help="copies of a prompt that are answered at the same time, with seeds where drawn"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    drafts = {"draft_model": args.draft_model, "draft_tokens": args.draft_tokens}
    on = {"speculative": args.speculative} | {name: value for name, value in drafts.items() if value is not None}
    llms = {
        name: LLM(args.model, quantize=args.quantize, max_running=args.batch, num_pages=256, **how)
        for name, how in (("off", {}), ("on", on))
    }
    print(f"{args.model} {args.quantize or ''} · {llms['off'].settings()['kernels']} · {on} · batch {args.batch}")
    print(f"{'':10} {'off tok/s':>10} {'on tok/s':>10} {'ratio':>6} {'drafted':>8} {'right':>6}  same answers")
    found = {}
    for name in args.prompts:
        found[name] = compare(llms, PROMPTS[name], args)
        row = found[name]
        ratio = row["on"] / row["off"]
        print(
            f"{name:10} {row['off']:10.1f} {row['on']:10.1f} {ratio:6.2f} {row['drafted']:8} {row['right']:6.0%}  {row['same']}", flush=True
        )
    if args.json:
        args.json.write_text(json.dumps({"settings": on | {"batch": args.batch}, "found": found}, indent=1))


def compare(llms: dict[str, LLM], prompt: str, args: argparse.Namespace) -> dict[str, float | int | bool]:
    """Median speed of decoding, the two engines in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in llms}
    answers = {}
    for _ in range(args.repeats):
        for name, llm in llms.items():
            ask = llm.stream_text if prompt is PROMPTS["copy"] else llm.stream
            streams = [ask(prompt, SamplingParams(max_tokens=args.tokens, temperature=args.temperature, seed=i)) for i in range(args.batch)]
            for stream in streams:
                list(stream)
            answers[name] = [stream.completion for stream in streams]
            slowest = max(done.timing.decode for done in answers[name])
            speeds[name].append(sum(done.timing.tokens - 1 for done in answers[name]) / slowest)
    drafted = sum(done.drafted_tokens for done in answers["on"])
    return {
        **{name: statistics.median(found) for name, found in speeds.items()},
        "drafted": drafted,
        "right": sum(done.accepted_tokens for done in answers["on"]) / max(1, drafted),
        "same": [done.token_ids for done in answers["on"]] == [done.token_ids for done in answers["off"]],
        "tokens": sum(done.timing.tokens for done in answers["on"]),
    }


if __name__ == "__main__":
    main()
