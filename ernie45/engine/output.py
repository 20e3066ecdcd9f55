"""What a step of the engine brings to a request, as values that can cross a process border. No tensors here."""

from dataclasses import dataclass

from ernie45.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a token, and the best tokens of its place with theirs, best first; natural logarithm, raw logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class BankLoad:
    """How often each expert of one layer was chosen since the start; `vision`: of those that pictures go to."""

    layer: int
    counts: tuple[int, ...]
    vision: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought to one request.

    tokens           new ids (the one that ended the answer included)
    logprobs         one entry per new id, when asked for
    prompt_logprobs  entries for further prompt tokens, when asked for; the first of all is for the second token
    finish           set on the request's last output
    cached_tokens    prompt tokens found in shared pages
    """

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    cached_tokens: int
