"""What is asked of the engine: a prompt in ids and how to sample from it. No tensors here.

Every setting is checked where it is made, so that nothing impossible reaches the step loop. What depends on the model (is an id inside
the vocabulary?) is checked by `Request.check_vocabulary` at the engine's door.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from ernie45.errors import RequestError
from ernie45.tokens.pictures import Picture

GREEDY_BELOW = 1e-5  # a temperature below this is greedy: dividing by it would overflow float32
MAX_LOGPROBS = 20
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class FinishReason(StrEnum):
    """Why a request ended."""

    stop = "stop"  # an end-of-text id, a stop id or a stop string
    length = "length"  # max_tokens or the longest context
    cancelled = "cancelled"
    grammar = "grammar"  # what its grammar allows is forbidden by other settings, or the grammar passed the limits on the way
    error = "error"  # its logits were not numbers, or the step that held it failed


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token. Raises `RequestError` that names the field.

    Applied in this order: repetition penalty (prompt and output), frequency and presence penalties (output), logit bias, bad words,
    min_tokens, temperature, top-k, top-p, min-p. Ties at a cut are all kept.

    max_tokens          None = as many as fit into the context
    min_tokens          end-of-text and stop ids are forbidden until so many tokens are out
    temperature         0 (or below 1e-5) = greedy
    top_k               0 = off
    bad_words           sequences of ids that may not appear in the output
    stop                strings that end the answer (found by the text side, in the content and not in the ids)
    seed                None = fresh for each request. Equal seeds give equal answers whatever else is running
    logprobs            None = off, 0..20 = log probability of the chosen token and of so many best ones, from the raw logits
                        (before penalties, bias and temperature)
    prompt_logprobs     the same for each prompt token after the first; such a prompt is computed whole, without shared pages
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, low=1, optional=True)
        _integer("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens")
        _number("temperature", self.temperature, low=0.0, high=100.0)
        _integer("top_k", self.top_k, low=0)
        _number("top_p", self.top_p, low=0.0, high=1.0, above_low=True)
        _number("min_p", self.min_p, low=0.0, high=1.0)
        _number("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, above_low=True)
        _number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        _integer("seed", self.seed, low=_INT64_MIN, high=_INT64_MAX, optional=True)
        _integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        _boolean("ignore_eos", self.ignore_eos)
        _boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "bad_words", _bad_words(self.bad_words))

    @property
    def greedy(self) -> bool:
        """True when the best token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """True when the tokens seen so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class PlacedPicture:
    """A picture, and where its tokens begin in the prompt."""

    start: int
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    id          unique among the requests that are alive
    eos_ids     ids that end the answer unless `ignore_eos`
    priority    smaller goes first; equal ones go in order of arrival
    arrival     seconds on the caller's clock, carried for its reports
    cache_salt  only requests with the same salt share prompt pages
    adapter     the adapter the model answers with; empty = none. Only requests with the same one share prompt pages
    grammar     what the answer must follow, as `engine.grammar` reads it; empty = anything. It ends the answer when it is complete, before
                min_tokens too
    pictures    what the prompt's placeholder tokens stand for, in order
    prediction  what the answer is likely to hold, word for word: drafts are made of it where the engine drafts from text, and it changes
                nothing else
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    adapter: str = ""
    grammar: str = ""
    pictures: tuple[PlacedPicture, ...] = ()
    prediction: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "cache_salt", "adapter", "grammar"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} must be a string, not {getattr(self, name)!r}", name)
        if not isinstance(self.params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(self.params).__name__}", "params")
        _integer("priority", self.priority, low=_INT64_MIN, high=_INT64_MAX)
        object.__setattr__(self, "prompt", _ids("prompt", self.prompt))
        object.__setattr__(self, "eos_ids", _ids("eos_ids", self.eos_ids))
        object.__setattr__(self, "prediction", _ids("prediction", self.prediction))
        if not self.prompt:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        if self.grammar and self.params.ignore_eos:
            raise RequestError("ignore_eos cannot be combined with a grammar: a complete answer could not end", "ignore_eos")

    def seen_between(self, start: int, end: int) -> bytes:
        """What the placeholders from `start` to `end` stand for: the digests of their pictures, in order."""
        placed = (p for p in self.pictures if p.start < end and start < p.start + p.picture.tokens)
        return b"".join(p.picture.digest for p in placed)

    def seen_tokens(self, kind: Literal["image", "video"]) -> int:
        """How many tokens of the prompt stand for images, or for videos."""
        return sum(placed.picture.tokens for placed in self.pictures if placed.picture.kind == kind)

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end the answer when sampled."""
        return frozenset(self.params.stop_token_ids if self.params.ignore_eos else self.params.stop_token_ids + self.eos_ids)

    def check_vocabulary(self, size: int) -> None:
        """Raises `RequestError` that names the field when an id is not in a vocabulary of `size` words."""
        params = self.params
        fields: tuple[tuple[str, Iterable[int]], ...] = (
            ("prompt", self.prompt),
            ("prediction", self.prediction),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("bad_words", (i for word in params.bad_words for i in word)),
        )
        for name, ids in fields:
            worst = max(ids, default=0)
            if worst >= size:
                raise RequestError(f"{name} holds the token id {worst}; this model's ids go from 0 to {size - 1}", name)
        if params.top_k > size:
            raise RequestError(f"top_k is {params.top_k}; this model has {size} words (0 turns top_k off)", "top_k")


def _integer(name: str, value: Any, *, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    span = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number {span}, not {value!r}", name)
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be {span}, not {value}", name)


def _number(name: str, value: Any, *, low: float, high: float, above_low: bool = False) -> None:
    span = f"{'above' if above_low else 'from'} {low:g} {'up ' if above_low else ''}to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number {span}, not {value!r}", name)
    if not math.isfinite(value) or value < low or value > high or (above_low and value == low):
        raise RequestError(f"{name} must be {span}, not {value!r}", name)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}", name)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of token ids, not {value!r}", name)
    ids = tuple(value)
    for i in ids:
        if type(i) is not int or not 0 <= i < 2**31:
            raise RequestError(f"{name} must hold token ids (whole numbers from 0), not {i!r}", name)
    return ids


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if isinstance(strings, Mapping) or not isinstance(strings, Iterable):
        raise RequestError(f"{name} must be a list of strings, not {value!r}", name)
    strings = tuple(strings)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} must hold strings that are not empty, not {text!r}", name)
    return strings


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not {value!r}", "logit_bias")
    _ids("logit_bias", tuple(value))
    for number in value.values():
        _number("logit_bias", number, low=-100.0, high=100.0)
    return dict(value)


def _bad_words(value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"bad_words must be a list of lists of token ids, not {value!r}", "bad_words")
    words = tuple(_ids("bad_words", word) for word in value)
    if not all(words):
        raise RequestError("bad_words holds an empty sequence", "bad_words")
    return words
