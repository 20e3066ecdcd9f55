"""`ernie bench latency MODEL`: how fast a model reads prompts and writes answers here, beside what the machine could do at most.

ernie bench latency starter
ernie bench latency FOLDER --prompt-tokens 512 --output-tokens 64 --batch 1 4 16 --json

Every batch is run `--warm-up` times unmeasured and `--repeats` times measured; the figures are medians, and --json has every run. Random
prompts, greedy answers of exactly so many tokens, no shared prefixes. The machine's limits are measured last, in the same process.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ernie45.config import Environment
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.errors import ConfigError
from ernie45.recipes.terminal import progress_bar, size_text

if TYPE_CHECKING:
    from ernie45.engine.core import EngineConfig
    from ernie45.engine.threads import Seating
    from ernie45.models.compute import ComputeType
    from ernie45.models.load import LoadedModel, OpenModel
    from ernie45.models.memory import Held, MemoryPlan
    from ernie45.models.text import Decoder

_NONE = tyro.conf.arg(help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig(ThreadSettings):
    """Measure prompt and answer speed of a model, memory, load time and the machine's limits, without a server around it."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "starter"
    """Folder, GGUF file, Hub name, or `starter`."""
    prompt_tokens: int = 512
    """Tokens of each prompt."""
    output_tokens: int = 64
    """Tokens each sequence writes after its first one."""
    batch: tuple[int, ...] = (1,)
    """Sequences at the same time; several numbers are measured one after the other."""
    repeats: int = 3
    """Measured runs of each batch; figures are their medians."""
    warm_up: int = 1
    """Unmeasured runs of each batch before."""
    token_budget: Annotated[int | None, _NONE] = None
    """Tokens computed per step (default: 512, and 2048 while no answer is being written, as everywhere)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of whole weights and of the cache."""
    skip_limits: bool = False
    """Do not measure what the machine can do at most, and so no shares of it."""
    seed: int = 1
    """Of the prompts."""
    json: bool = False
    """Print one JSON object with every run, and no table."""
    out: Annotated[Path | None, _NONE] = None
    """Write the JSON object here too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_tokens", "output_tokens", "repeats", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not self.batch or min(self.batch) < 1:
            raise ConfigError("--batch takes numbers of at least 1, such as --batch 1 4 16")
        if self.warm_up < 0:
            raise ConfigError(f"--warm-up is {self.warm_up}; it must be at least 0")


@dataclass(frozen=True)
class Timing:
    """One run. `first_token_s` until every sequence has its first token, `decode_s` for all the tokens after it."""

    first_token_s: float
    decode_s: float


def run(config: LatencyConfig, environment: Environment) -> int:
    """Measure and print. Returns the exit code. Raises ErnieError subclasses for a model or settings that do not work."""
    report = measure(config, environment)
    text = json.dumps(report, indent=1)
    if config.out is not None:
        try:
            config.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {config.out} cannot be written: {error.strerror}") from None
    print(text if config.json else table(report))
    return 0


def measure(config: LatencyConfig, environment: Environment) -> dict[str, Any]:
    """Everything that was measured, as plain data; seconds, bytes, tokens per second."""
    with progress_bar(environment) as progress:
        progress("loading", 0, 0)
        import torch

        from ernie45.engine.threads import Crew
        from ernie45.models.load import find_model, load
        from ernie45.recipes.bench.ceiling import Footprint
        from ernie45.recipes.bench.limits import measure_limits

        path = find_model(config.model, environment, lambda line: progress(line, 0, 0))
        crew = Crew(config, cache=environment.cache_dir)
        base, weights = resident_bytes(), []

        def approve(opened: "OpenModel", compute: "ComputeType", held: "Held") -> None:
            weights.append(held)
            crew.before_loading(held.total)

        began = time.perf_counter()
        loaded = load(path, dtype=config.dtype, mtp=False, compact=True, approve=approve)
        load_s = time.perf_counter() - began
        decoder = loaded.decoder
        progress("threads", 0, 0)
        seating = crew.after_loading(decoder, str(path))
        needed = config.prompt_tokens + config.output_tokens + 1
        if needed > decoder.config.max_positions:
            raise ConfigError(
                f"prompt and output are {needed} tokens with the first; the model knows positions for {decoder.config.max_positions}"
            )
        loaded_bytes = peak_bytes()
        footprint = Footprint.of(decoder)
        results: list[dict[str, Any]] = []
        cold: float | None = None
        rounds = config.warm_up + config.repeats
        for batch in sorted(set(config.batch)):
            runs: list[Timing] = []
            prompts = _prompts(config, batch, decoder.words())
            for number in range(rounds):
                progress(f"batch {batch}", len(results) * rounds + number, len(set(config.batch)) * rounds)
                runs.append(time_run(decoder, prompts, config.output_tokens, config.token_budget))
            cold = runs[0].first_token_s if cold is None else cold
            results.append(_summary(config, batch, runs[config.warm_up :]))
            results[-1]["memory"] = _memory(_plan(config, batch, loaded, weights[0]), peak_bytes() - base)
        del decoder, loaded
        limits = None
        if not config.skip_limits:
            progress("the machine's limits", 0, 0)
            limits = measure_limits(torch.get_num_threads())
            for result in results:
                middle = config.prompt_tokens + config.output_tokens // 2
                result["prefill_limit"] = footprint.prefill_limit(limits, config.prompt_tokens)
                result["decode_limit"] = footprint.decode_limit(limits, result["batch"], middle)
                for kind in ("prefill", "decode"):
                    result[f"{kind}_share"] = result[f"{kind}_tokens_per_s"] / result[f"{kind}_limit"]
    return {
        "model": config.model,
        **_about(footprint, seating),
        "prompt_tokens": config.prompt_tokens,
        "output_tokens": config.output_tokens,
        "warm_up": config.warm_up,
        "repeats": config.repeats,
        "load_s": load_s,
        "cold_first_token_s": cold,
        "peak_bytes_loaded": loaded_bytes,
        "limits": None if limits is None else asdict(limits),
        "results": results,
    }


def time_run(decoder: "Decoder", prompts: list[list[int]], output_tokens: int, token_budget: int | None = None) -> Timing:
    """Run prompts through an engine of their own: scheduler, paged cache and sampler included.

    Tokens that early sequences wrote while later prompts were still read are taken off the share that the second figure stands for.
    """
    from ernie45.engine.core import Engine
    from ernie45.engine.request import Request, SamplingParams

    config = _engine_config(len(prompts), len(prompts[0]) + output_tokens + 1, token_budget)
    engine = Engine(decoder, config)
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens + 1, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=str(i), prompt=tuple(prompt), params=params, eos_ids=()))
    waiting, written = {str(i) for i in range(len(prompts))}, 0
    while waiting:
        for output in engine.step():
            waiting.discard(output.request_id)
            written += len(output.tokens)
    first = time.perf_counter()
    while not engine.idle:
        engine.step()
    end = time.perf_counter()
    after = len(prompts) * output_tokens
    early = written - len(prompts)
    return Timing(first - start, (end - first) * after / max(1, after - early))


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = _status_bytes("VmHWM")  # what getrusage says begins with the peak of whoever started this process
    if peak is not None:
        return peak
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def resident_bytes() -> int:
    """The memory that this process has resident now; the most it ever had where the system tells no more."""
    now = _status_bytes("VmRSS")
    return peak_bytes() if now is None else now


def _status_bytes(name: str) -> int | None:
    """A figure of Linux's account of this process; None elsewhere."""
    account = Path("/proc/self/status")
    lines = account.read_text().splitlines() if account.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _engine_config(batch: int, length: int, token_budget: int | None) -> "EngineConfig":
    """Room for exactly so many sequences of exactly that length."""
    from ernie45.engine.core import EngineConfig

    made = EngineConfig(max_running=batch, max_length=length, prefix_sharing=False)
    return replace(made, token_budget=token_budget, idle_budget=token_budget) if token_budget else made


def _plan(config: LatencyConfig, batch: int, loaded: "LoadedModel", held: "Held") -> "MemoryPlan":
    """What `ernie chat` and `ernie serve` would have planned for this batch; nothing is looked at, and there is no tokenizer."""
    from ernie45.models.memory import plan_memory

    opened, dtype = loaded.opened, loaded.compute.dtype
    engine = _engine_config(batch, config.prompt_tokens + config.output_tokens + 1, config.token_budget)
    use = engine.use(opened.config, dtype, adapters=False, packed=opened.spec is not None, spec=opened.spec, stored=opened.stored)
    use = replace(use, step_tokens=min(use.step_tokens, batch * config.prompt_tokens), tokenizer=False)
    return plan_memory(replace(opened.described, vision=None), held, use)


def _memory(plan: "MemoryPlan", taken: int) -> dict[str, int]:
    """Bytes planned and measured. Work is what is left of the measured peak without weights and cache; both fill wholly."""
    left = taken - plan.weights - plan.cache
    return {"planned": plan.total, "measured": taken, "work_planned": plan.work, "work_measured": left}


def _prompts(config: LatencyConfig, batch: int, words: Sequence[int]) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    places = torch.randint(len(words), (batch, config.prompt_tokens), generator=generator)
    return torch.tensor(words)[places].tolist()


def _summary(config: LatencyConfig, batch: int, runs: list[Timing]) -> dict[str, Any]:
    first, decode = (statistics.median(getattr(timing, name) for timing in runs) for name in ("first_token_s", "decode_s"))
    return {
        "batch": batch,
        "prefill_tokens_per_s": batch * config.prompt_tokens / first,
        "decode_tokens_per_s": batch * config.output_tokens / decode,
        "first_token_s": first,
        "per_token_s": decode / config.output_tokens,
        "peak_bytes": peak_bytes(),
        "runs": [asdict(timing) for timing in runs],
    }


def _about(footprint: Any, seating: "Seating") -> dict[str, Any]:
    from ernie45 import __version__, ops
    from ernie45.models.counts import count_parameters

    count = count_parameters(footprint.model)
    return {
        "version": __version__,
        "dtype": str(footprint.dtype).removeprefix("torch."),
        "packed": footprint.packed,
        "weight_bytes": footprint.always + footprint.routed,
        "parameters": count.total,
        "active_parameters": count.active_with_head,
        "threads": seating.threads,
        "seating": seating.text(),
        "kernels": ops.describe(),
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    kind = f"packed, {report['dtype']} beside" if report["packed"] else report["dtype"]
    lines = [
        f"{report['model']}: {size_text(report['parameters'], '')} parameters, {kind}, {size_text(report['weight_bytes'])} of weights",
        report["kernels"],
        f"threads: {report['seating']}",
        f"prompt {report['prompt_tokens']}, output {report['output_tokens']} tokens; "
        f"medians of {report['repeats']} runs after {report['warm_up']} to warm up",
        f"load {report['load_s']:.2f} s, first token of the cold model after another {report['cold_first_token_s']:.2f} s, "
        f"{size_text(report['peak_bytes_loaded'])} at most while loading",
    ]
    head = ["batch", "prefill tok/s", "of limit", "decode tok/s", "of limit", "first token s", "per token ms", "memory", "planned"]
    rows = [head]
    for result in report["results"]:
        shares = [f"{result[f'{name}_share']:.0%}" if f"{name}_share" in result else "" for name in ("prefill", "decode")]
        rows.append(
            [
                str(result["batch"]),
                f"{result['prefill_tokens_per_s']:.0f}",
                shares[0],
                f"{result['decode_tokens_per_s']:.1f}",
                shares[1],
                f"{result['first_token_s']:.3f}",
                f"{1000 * result['per_token_s']:.1f}",
                size_text(result["memory"]["measured"]),
                size_text(result["memory"]["planned"]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["", *("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)]
    if report["limits"]:
        limits = report["limits"]
        lines += [
            "",
            f"limits  {limits['read_gb_per_s']:.1f} GB/s read; {limits['float32_gflops']:.0f} GFLOP/s in float32, "
            f"{limits['bfloat16_gflops']:.0f} in bfloat16, {limits['int8_gops']:.0f} GOP/s in int8; {limits['cpu']}",
        ]
    return "\n".join(lines)
