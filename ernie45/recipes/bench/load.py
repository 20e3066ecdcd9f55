"""A client that asks a server as many people would, and keeps the time of everything that comes back.

Two ways to ask: so many requests at a time, each followed by the next (closed), or at a rate, whether the server keeps up or not (open,
with the gaps of a Poisson process). In the open way a request's time begins when it was due, so that a wait for a free place counts.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ernie45.errors import ConfigError

_ROUTES = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to be sent: the fields that differ between requests, and how many tokens it may bring."""

    fields: dict[str, Any]
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go and what all of them say. `seconds` is the patience for one request."""

    url: str
    route: str
    common: dict[str, Any]
    key: str | None = None
    seconds: float = 600.0


@dataclass
class Sample:
    """What one request brought; times in seconds since the run began, `pieces` those of every piece of text."""

    due: float
    sent: float = 0.0
    first: float | None = None
    end: float = 0.0
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None for answers of one token."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.end - self.first) / (self.output_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When requests are sent: `rate` a second (None: as fast as places become free) in at most `places` places.

    `ramp` seconds pass until rate, or places, are what they are to be.
    """

    rate: float | None
    places: int
    ramp: float
    seed: int

    def dues(self, count: int) -> list[float]:
        """When each of `count` requests is due, in seconds."""
        if self.rate is None:
            return [0.0] * count
        dice, now, dues = random.Random(self.seed), 0.0, []
        for _ in range(count):
            reached = min(1.0, max(now, 0.05 * self.ramp) / self.ramp) if self.ramp else 1.0
            now += dice.expovariate(self.rate * reached)
            dues.append(now)
        return dues


async def drive(target: Target, asks: Sequence[Ask], pace: Pace, told: Callable[[int], None]) -> list[Sample]:
    """Send everything and wait for the ends. A failure is a sample with an error and never an exception."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=pace.places)
    headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
    waiting = iter(zip(asks, (Sample(due=due) for due in pace.dues(len(asks))), strict=True))
    done: list[Sample] = []
    async with httpx.AsyncClient(base_url=target.url, headers=headers, limits=limits, timeout=target.seconds, trust_env=False) as client:
        began = time.perf_counter()

        async def place(number: int) -> None:
            if pace.rate is None and pace.ramp:
                await asyncio.sleep(pace.ramp * number / pace.places)
            for ask, sample in waiting:
                await asyncio.sleep(max(0.0, sample.due - (time.perf_counter() - began)))
                if pace.rate is None:
                    sample.due = time.perf_counter() - began
                await send(client, target, ask, sample, began)
                done.append(sample)
                told(len(done))

        await asyncio.gather(*(place(number) for number in range(min(pace.places, len(asks)))))
    return sorted(done, key=lambda sample: sample.due)


async def send(client: httpx.AsyncClient, target: Target, ask: Ask, sample: Sample, began: float) -> None:
    """One streamed request into its sample."""
    body = target.common | ask.fields | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": ask.output_tokens}
    sample.sent = time.perf_counter() - began
    whole = False
    try:
        async with asyncio.timeout(target.seconds), client.stream("POST", _ROUTES[target.route], json=body) as response:
            if response.status_code != 200:
                sample.error = f"status {response.status_code}"
                await response.aread()
            else:
                async for line in response.aiter_lines():
                    whole |= line == "data: [DONE]"
                    if line.startswith("data: {"):
                        _take(json.loads(line[6:]), sample, time.perf_counter() - began)
    except (httpx.HTTPError, TimeoutError, ValueError) as error:
        sample.error = type(error).__name__
    sample.end = time.perf_counter() - began
    if sample.error is None and not whole:
        sample.error = "cut short"


def _take(event: dict[str, Any], sample: Sample, now: float) -> None:
    if "error" in event:
        sample.error = f"in the stream: {(event['error'] or {}).get('code') or 'error'}"
    usage = event.get("usage") or {}
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        # an empty piece carries a token too, such as half a character, but the role alone does not
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            sample.first = now if sample.first is None else sample.first
            sample.pieces.append(now)
            sample.output_tokens += not usage
    sample.output_tokens = usage.get("completion_tokens") or sample.output_tokens
    sample.prompt_tokens = usage.get("prompt_tokens") or sample.prompt_tokens


async def first_model(target: Target) -> str:
    """The name of the first model the server lists. Raises `ConfigError` when there is no such server or list."""
    headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
    try:
        async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=10, trust_env=False) as client:
            answer = await client.get("/v1/models")
        if answer.status_code != 200:
            raise ConfigError(f"{target.url}/v1/models answers {answer.status_code}; name the model with --model, or a key with --key-file")
        return answer.json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise ConfigError(f"no server answers at {target.url} ({type(error).__name__}); start one, or name another address") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{target.url}/v1/models lists no model; name one with --model") from None
