"""What a step of the engine brings to a request, as values that can cross a process border. No tensors here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    drafted          tokens that were guessed for this step, and accepted: how many of them turned out right
    """

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish: FinishReason | None
    cached_tokens: int
    drafted: int = 0
    accepted: int = 0

    def one_by_one(self) -> "Iterator[Output]":
        """The same as if each token had come with a step of its own, so that an answer may end between them."""
        if len(self.tokens) < 2:
            yield self
            return
        *early, last = ((token,) for token in self.tokens)
        logprobs = [(entry,) for entry in self.logprobs] or [()] * len(self.tokens)
        prompt_logprobs, drafted, accepted = self.prompt_logprobs, self.drafted, self.accepted
        for token, entry in zip(early, logprobs, strict=False):
            yield replace(
                self, tokens=token, logprobs=entry, prompt_logprobs=prompt_logprobs, finish=None, drafted=drafted, accepted=accepted
            )
            prompt_logprobs, drafted, accepted = (), 0, 0
        yield replace(self, tokens=last, logprobs=logprobs[-1], prompt_logprobs=(), drafted=0, accepted=0)
