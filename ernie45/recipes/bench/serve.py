"""`ernie bench serve URL`: how a server keeps up with many clients; any server that speaks OpenAI's protocol.

ernie bench serve                                                       a server on this machine, one request after the other
ernie bench serve http://host:8000 --concurrency 16 --requests 200      sixteen at a time
ernie bench serve URL --rate 4 --ramp 10 --slo ttft=500 tpot=50         four a second, and how many were quick enough
ernie bench serve URL --dataset prompts.jsonl --out run.json --picture run.png
"""

import asyncio
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ernie45.config import Environment
from ernie45.errors import ConfigError, DataError, MissingExtra
from ernie45.recipes.terminal import progress_bar

if TYPE_CHECKING:
    from ernie45.recipes.bench.load import Ask, Sample, Target

_NONE = tyro.conf.arg(help_behavior_hint="")
_WORDS = ("river", "stone", "light", "house", "morning", "paper", "green", "window", "quiet", "seven", "garden", "letter", "winter")
_GOALS = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    """Load a server that speaks OpenAI's protocol, and measure first tokens, gaps, whole requests, throughput and errors."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = "http://127.0.0.1:8000"
    """Address of the server, without /v1."""
    model: Annotated[str | None, _NONE] = None
    """Model to ask (default: the first the server lists)."""
    route: Literal["completions", "chat"] = "completions"
    """completions takes prompts of exactly so many random token ids; chat takes random words."""
    requests: int = 32
    """Requests in all; a dataset is repeated if it is shorter."""
    concurrency: Annotated[int | None, _NONE] = None
    """Requests at the same time (default: 1, or with --rate without limit)."""
    rate: Annotated[float | None, _NONE] = None
    """Requests a second, at random moments; without it each request follows the one before."""
    ramp: float = 0.0
    """Seconds in which rate, or concurrency, rises to what it is to be."""
    prompt_tokens: int = 256
    """Tokens (for chat: words) of a prompt."""
    output_tokens: int = 128
    """Tokens of an answer."""
    spread: float = 0.0
    """Lengths vary by this share both ways, at random: 0.5 is from half to one and a half."""
    dataset: Annotated[Path | None, _NONE] = None
    """JSON lines with `prompt` or `messages`, and `output_tokens` if wanted, instead of random prompts."""
    vocabulary: int = 10000
    """Random ids are below this; it must not be larger than the model's vocabulary."""
    shared_prefix: int = 0
    """So many tokens at the beginning are the same in every prompt."""
    warm_up: int = 1
    """Requests that are sent before and not counted."""
    respect_eos: bool = False
    """Answers may end early; else `ignore_eos` is sent, which llama.cpp's and vLLM's servers know as well."""
    temperature: float = 0.0
    """Of the sampling."""
    slo: tuple[str, ...] = ()
    """Goals in milliseconds for goodput: ttft=500 tpot=50 itl=200 e2e=10000."""
    timeout: float = 600.0
    """Seconds of patience for one request."""
    key_file: Annotated[Path | None, _NONE] = None
    """File with the API key (default: the first of ERNIE45_API_KEYS)."""
    seed: int = 1
    """Of prompts, lengths and moments."""
    json: bool = False
    """Print one JSON object and no table."""
    out: Annotated[Path | None, _NONE] = None
    """Write the JSON object here, with every request in it."""
    picture: Annotated[Path | None, _NONE] = None
    """Write a PNG here: distributions, and throughput over time."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]", self.url):
            raise ConfigError(f"'{self.url}' is no address of a server; write http://host:port")
        for name in ("requests", "concurrency", "prompt_tokens", "output_tokens", "rate", "timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and value < 1e9):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        for name in ("ramp", "warm_up", "shared_prefix", "temperature"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"--spread is {self.spread}; it must be at least 0 and below 1")
        if self.vocabulary < 200:
            raise ConfigError(f"--vocabulary is {self.vocabulary}; it must be at least 200: low ids are control tokens and are not sent")
        self.goals()

    def goals(self) -> dict[str, float]:
        """Milliseconds by kind. Raises `ConfigError` for what is no goal."""
        goals: dict[str, float] = {}
        for text in self.slo:
            found = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", text)
            if found is None or found[1] not in _GOALS:
                raise ConfigError(f"--slo '{text}' is no goal; write {', '.join(f'{kind}=MILLISECONDS' for kind in _GOALS)}")
            goals[found[1]] = float(found[2])
        return goals


def run(config: BenchServeConfig, environment: Environment) -> int:
    """Load the server and print. Returns 0, or 1 when no request succeeded. Raises ErnieError subclasses for mistakes."""
    try:
        from ernie45.recipes.bench.figures import table
        from ernie45.recipes.bench.picture import draw
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "httpx", "bench") from None
    report, samples = measure(config, environment)
    if config.out is not None:
        every = [vars(sample) for sample in samples]
        try:
            config.out.write_text(json.dumps(report | {"samples": every}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {config.out} cannot be written: {error.strerror}") from None
    if config.picture is not None:
        draw(samples, f"{report['model']}: {report['load']}", config.picture)
    print(json.dumps(report, indent=1) if config.json else f"{report['model']} at {config.url}: {report['load']}\n{table(report)}")
    return 0 if report["succeeded"] else 1


def measure(config: BenchServeConfig, environment: Environment) -> tuple[dict[str, Any], "list[Sample]"]:
    """The figures with what they were taken with, and every request."""
    from dataclasses import replace

    from ernie45.recipes.bench.figures import figures
    from ernie45.recipes.bench.load import Pace, Target, drive, first_model

    target = Target(
        url=config.url.rstrip("/").removesuffix("/v1"),
        route=config.route,
        common={"temperature": config.temperature} | ({} if config.respect_eos else {"ignore_eos": True}),
        key=_key(config, environment),
        seconds=config.timeout,
    )
    places = config.concurrency or (1 if config.rate is None else config.requests)
    pace = Pace(rate=config.rate, places=places, ramp=config.ramp, seed=config.seed)

    async def whole() -> "tuple[list[Sample], Target]":
        model = config.model or await first_model(target)
        ready = replace(target, common=target.common | {"model": model})
        asks = make_asks(config)
        warm = Pace(rate=None, places=min(config.warm_up, places) or 1, ramp=0.0, seed=0)
        await drive(ready, [asks[i % len(asks)] for i in range(config.warm_up)], warm, lambda done: None)
        return await drive(ready, asks, pace, lambda done: progress("requests", done, len(asks))), ready

    with progress_bar(environment) as progress:
        samples, asked = asyncio.run(whole())
    how = f"{config.rate:g} requests/s" if config.rate is not None else f"{places} at a time"
    lengths = config.dataset.name if config.dataset else f"prompt {config.prompt_tokens}, output {config.output_tokens}"
    about = {"model": asked.common["model"], "load": f"{how}, {lengths}", "url": target.url, "route": config.route}
    settings = {
        name: getattr(config, name) for name in ("rate", "ramp", "prompt_tokens", "output_tokens", "spread", "shared_prefix", "seed")
    }
    return about | {"concurrency": places} | settings | figures(samples, config.goals()), samples


def make_asks(config: BenchServeConfig) -> "list[Ask]":
    """The requests, from the dataset or at random. Raises `DataError` for a dataset that cannot be used."""
    from ernie45.recipes.bench.load import Ask

    if config.dataset is not None:
        rows = read_dataset(config.dataset, config.route, config.output_tokens)
        return [rows[i % len(rows)] for i in range(config.requests)]
    dice = random.Random(config.seed)

    def length(middle: int) -> int:
        return max(1, round(middle * dice.uniform(1 - config.spread, 1 + config.spread)))

    asks = []
    same = [dice.randrange(100, config.vocabulary) for _ in range(config.shared_prefix)]
    for _ in range(config.requests):
        size = length(config.prompt_tokens)
        ids = [*same[:size], *(dice.randrange(100, config.vocabulary) for _ in range(size - len(same)))]
        if config.route == "completions":
            fields: dict[str, Any] = {"prompt": ids}
        else:
            fields = {"messages": [{"role": "user", "content": " ".join(_WORDS[id % len(_WORDS)] for id in ids)}]}
        asks.append(Ask(fields=fields, output_tokens=length(config.output_tokens)))
    return asks


def read_dataset(path: Path, route: str, output_tokens: int) -> "list[Ask]":
    """Rows of JSON lines as requests. Raises `DataError` that names the line."""
    from ernie45.recipes.bench.load import Ask

    field = "prompt" if route == "completions" else "messages"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the dataset {path} cannot be read: {error}") from None
    asks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error})") from None
        if isinstance(row, dict) and route == "chat" and isinstance(row.get("prompt"), str):
            row = row | {"messages": [{"role": "user", "content": row["prompt"]}]}
        if not isinstance(row, dict) or not row.get(field):
            raise DataError(f"{path}, line {number}: a row for --route {route} needs `{field}`")
        tokens = row.get("output_tokens", output_tokens)
        if not isinstance(tokens, int) or tokens < 1:
            raise DataError(f"{path}, line {number}: output_tokens is {tokens!r}; it must be a whole number of at least 1")
        asks.append(Ask(fields={field: row[field]}, output_tokens=tokens))
    if not asks:
        raise DataError(f"the dataset {path} is empty")
    return asks


def _key(config: BenchServeConfig, environment: Environment) -> str | None:
    if config.key_file is None:
        return environment.api_keys[0] if environment.api_keys else None
    try:
        return config.key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--key-file {config.key_file} cannot be read: {error.strerror}") from None
