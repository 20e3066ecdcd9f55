"""Samples of a load run as figures: rates, percentiles, goodput, errors."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ernie45.recipes.bench.load import Sample

PERCENTILES = (50, 90, 95, 99)
KINDS = {
    "ttft": "time to first token",
    "tpot": "time per token after the first",
    "itl": "gap between pieces of text",
    "e2e": "whole request",
}


def values_of(samples: Sequence[Sample], kind: str) -> list[float]:
    """Milliseconds of one kind, of the samples that did not fail, sorted."""
    good = [sample for sample in samples if sample.error is None]
    if kind == "ttft":
        found = [sample.first - sample.due for sample in good if sample.first is not None]
    elif kind == "tpot":
        found = [each for sample in good if (each := sample.per_token) is not None]
    elif kind == "itl":
        found = [later - earlier for sample in good for earlier, later in pairwise(sample.pieces)]
    else:
        found = [sample.end - sample.due for sample in good]
    return sorted(1000 * value for value in found)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of sorted values that at least `share` per cent do not pass."""
    return values[max(0, math.ceil(share / 100 * len(values)) - 1)]


def within(sample: Sample, goals: dict[str, float]) -> bool:
    """Whether one request kept every goal, in milliseconds by kind."""
    if sample.error is not None:
        return False
    return all(max(values_of([sample], kind), default=0.0) <= goal for kind, goal in goals.items())


def figures(samples: Sequence[Sample], goals: dict[str, float]) -> dict[str, Any]:
    """Everything as plain data. Times in milliseconds, rates a second over the span from the first request due to the last end."""
    good = [sample for sample in samples if sample.error is None]
    span = max((sample.end for sample in samples), default=0.0) - min((sample.due for sample in samples), default=0.0)
    span = max(span, 1e-9)
    report: dict[str, Any] = {
        "requests": len(samples),
        "succeeded": len(good),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None)),
        "seconds": span,
        "requests_per_s": len(good) / span,
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "output_tokens": sum(sample.output_tokens for sample in good),
        "output_tokens_per_s": sum(sample.output_tokens for sample in good) / span,
        "total_tokens_per_s": sum(sample.prompt_tokens + sample.output_tokens for sample in good) / span,
    }
    for kind in KINDS:
        values = values_of(samples, kind)
        if values:
            report[f"{kind}_ms"] = {
                "mean": sum(values) / len(values),
                **{f"p{share}": percentile(values, share) for share in PERCENTILES},
                "max": values[-1],
            }
        else:
            report[f"{kind}_ms"] = None
    if goals:
        kept = sum(within(sample, goals) for sample in samples)
        report["goodput"] = {"goals_ms": goals, "share": kept / max(1, len(samples)), "requests_per_s": kept / span}
    return report


def table(report: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{report['succeeded']} of {report['requests']} requests in {report['seconds']:.1f} s: {report['requests_per_s']:.2f} a second, "
        f"{report['output_tokens_per_s']:.1f} tokens/s written, {report['total_tokens_per_s']:.1f} with prompts",
        "",
        f"{'milliseconds':<34}" + "".join(f"{name:>10}" for name in ("mean", *(f"p{share}" for share in PERCENTILES), "max")),
    ]
    for kind, name in KINDS.items():
        found = report[f"{kind}_ms"]
        row = "".join(f"{value:>10.1f}" for value in found.values()) if found else "        none"
        lines.append(f"{f'{kind}  {name}':<34}{row}")
    if "goodput" in report:
        goals = ", ".join(f"{kind} {goal:g} ms" for kind, goal in report["goodput"]["goals_ms"].items())
        lines.append(f"goodput: {report['goodput']['requests_per_s']:.2f} requests/s ({report['goodput']['share']:.0%}) within {goals}")
    lines += [f"failed: {count} with {error}" for error, count in report["errors"].items()]
    return "\n".join(lines)
