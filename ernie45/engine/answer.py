"""One answer on its way from ids to text: whole characters, stop strings, reasoning, tool calls, timing. No tensors here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ernie45.engine.output import Output, TokenLogprobs
from ernie45.engine.request import FinishReason, Request
from ernie45.engine.stops import StopFinder
from ernie45.tokens.messages import ToolCall
from ernie45.tokens.parse import Delta, ReplyFormat, ReplyParser, collect
from ernie45.tokens.tokenizer import Tokenizer

_CLOSE = "</think>"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds. `prefill` is from asking to the first token, waiting included; `decode` from there to the last."""

    prefill: float
    decode: float
    tokens: int

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None when there was no second one."""
        return (self.tokens - 1) / self.decode if self.tokens > 1 and self.decode > 0 else None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer.

    text           the answer; without a tokenizer, empty
    reasoning      the thinking before it; None when there was none
    token_ids      every sampled id, the one that ended the answer included
    finish_reason  stop, length, cancelled or error
    cached_tokens  how many of the prompt's tokens were found in shared pages
    logprobs       one entry per id when asked for; None for ids that a thinking budget put in
    prompt_logprobs one entry per prompt token from the second on, when asked for
    image_tokens    prompt tokens that stand for images, and video_tokens for videos
    drafted_tokens  tokens that were guessed ahead, and accepted_tokens those that turned out right
    """

    text: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    timing: Timing
    image_tokens: int = 0
    video_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Answer:
    """Takes in the engine's outputs for one request and gives deltas.

    budget     tokens of reasoning after which it is closed by hand; None = as many as the model likes
    finish     set when the answer is over; the engine may still be running it when a stop string ended it
    """

    def __init__(
        self,
        request: Request,
        max_tokens: int,
        now: float,
        *,
        tokenizer: Tokenizer | None = None,
        reply_format: ReplyFormat | None = None,
        starts_in: str = "content",
        budget: int | None = None,
    ) -> None:
        """max_tokens: as the engine resolved it. reply_format: None leaves the text as it is."""
        self.request = request
        self.finish: FinishReason | None = None
        self._max_tokens = max_tokens
        self._prompt_tokens = len(request.prompt)
        self._tokenizer = tokenizer
        self._text = None if tokenizer is None else tokenizer.stream(keep=reply_format.tags if reply_format else ())
        self._parser = ReplyParser(reply_format, starts_in) if reply_format else None
        self._stops = StopFinder(request.params.stop, include=request.params.include_stop_str_in_output)
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs | None] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._deltas: list[Delta] = []
        self._told = 0
        self._cached = 0
        self._drafted = 0
        self._accepted = 0
        self._asked = now
        self._first = self._last = now
        self._sampled = 0
        self._budget = budget
        self._reasoning = starts_in == "reasoning"
        self._reasoned = 0
        self._tail = ""
        self._called = 0

    @property
    def ids(self) -> Sequence[int]:
        """Every id so far, those a thinking budget put in included; not to be changed."""
        return self._ids

    @property
    def logprobs(self) -> Sequence[TokenLogprobs | None]:
        """One entry per id when they were asked for, else empty; not to be changed."""
        return self._logprobs

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt as it was asked."""
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of them were found in shared pages."""
        return self._cached

    @property
    def drafted_tokens(self) -> int:
        """How many tokens were guessed ahead for it."""
        return self._drafted

    @property
    def accepted_tokens(self) -> int:
        """How many of those turned out right."""
        return self._accepted

    @property
    def reasoning_tokens(self) -> int:
        """Ids of the thinking so far."""
        return self._reasoned

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._stops.found

    @property
    def calls_done(self) -> int:
        """Tool calls that are complete."""
        return self._called

    @property
    def over_budget(self) -> bool:
        """True when the reasoning has used its budget and goes on: continue with `closing` in place of the request."""
        return self.finish is None and self._budget is not None and self._reasoning and self._reasoned >= self._budget

    def take(self, output: Output, now: float) -> None:
        """One output of the engine, at the time `now`."""
        if self.finish is not None:
            return
        self._prompt_logprobs += output.prompt_logprobs
        self._cached = max(self._cached, output.cached_tokens)
        self._drafted += output.drafted
        self._accepted += output.accepted
        if output.tokens:
            self._first = self._first if self._sampled else now
            self._last = now
            self._sampled += len(output.tokens)
        self._logprobs += output.logprobs
        ended = output.finish is FinishReason.stop and not self.request.params.include_stop_str_in_output
        self._push(output.tokens, output.tokens[:-1] if ended else output.tokens)
        if self._stops.found is not None:
            self.finish = FinishReason.stop
        elif output.finish is not None:
            self._end(output.finish)

    def closing(self) -> Request | None:
        """The request that goes on behind a closed thinking block, of the same id; None (and the answer ends) when there is no room.

        The prompt's and answer's pages are still known, so nothing but the closing is computed. To the new request the reasoning is
        prompt: presence and frequency penalties count from here.
        """
        assert self._tokenizer is not None
        forced = tuple(self._tokenizer.encode(f"\n{_CLOSE}\n\n", allow_special=True, start=False))
        params = self.request.params
        left = self._max_tokens - len(self._ids) - len(forced)
        if left < 1:
            self._end(FinishReason.length)
            return None
        self._reasoning, self._budget = False, None
        self._push(forced, forced)
        if params.logprobs is not None:
            self._logprobs += [None] * len(forced)
        changed = replace(
            params,
            max_tokens=left,
            min_tokens=max(0, min(left, params.min_tokens - len(self._ids))),
            seed=None if params.seed is None else params.seed ^ 1,
            prompt_logprobs=None,
        )
        return replace(self.request, prompt=self.request.prompt + tuple(self._ids), params=changed)

    def stop_here(self) -> None:
        """Ends it as if it had ended by itself, unless it is over."""
        if self.finish is None:
            self._end(FinishReason.stop)

    def cancel(self) -> None:
        """Ends it here, unless it is over."""
        if self.finish is None:
            self._end(FinishReason.cancelled)

    def deltas(self) -> list[Delta]:
        """What is new since the last call."""
        new = self._deltas[self._told :]
        self._told = len(self._deltas)
        return new

    def completion(self) -> Completion:
        """The answer as far as it has come; its finish_reason is cancelled when it is not over."""
        reply = collect(self._deltas)
        params = self.request.params
        return Completion(
            text=reply.content,
            reasoning=reply.reasoning,
            tool_calls=reply.tool_calls,
            token_ids=tuple(self._ids),
            finish_reason=self.finish or FinishReason.cancelled,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self._prompt_logprobs),
            image_tokens=self.request.seen_tokens("image"),
            video_tokens=self.request.seen_tokens("video"),
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            timing=Timing(prefill=self._first - self._asked, decode=self._last - self._first, tokens=self._sampled),
        )

    def _push(self, ids: Sequence[int], shown: Sequence[int]) -> None:
        self._ids += ids
        if self._reasoning:
            self._reasoned += len(ids)
        if self._text is not None:
            self._read(self._text.push(shown))

    def _read(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:  # nothing in it is a thinking, or its end
            self._emit([Delta("content", text)])
            return
        self._emit(self._parser.push(text))
        self._tail = (self._tail + text)[-len(text) - len(_CLOSE) :]
        if _CLOSE in self._tail:
            self._reasoning = False

    def _emit(self, deltas: Sequence[Delta]) -> None:
        """Stop strings are looked for in the content, not in reasoning and calls, once min_tokens are out."""
        for delta in deltas:
            self._reasoning = delta.kind == "reasoning"
            self._called += delta.kind == "tool_call" and delta.valid is not None
            if self._stops.found is not None:
                return
            if delta.kind != "content":
                self._show(self._stops.finish())
                self._deltas.append(delta)
            else:
                short = len(self._ids) < self.request.params.min_tokens
                shown = delta.text if short else self._stops.push(delta.text)
                if shown == delta.text:  # as nearly always: the delta goes on as it is
                    self._deltas.append(delta)
                else:
                    self._show(shown)

    def _show(self, content: str) -> None:
        if content:
            self._deltas.append(Delta("content", content))

    def _end(self, finish: FinishReason) -> None:
        if self._text is not None:
            self._read(self._text.finish())
        if self._parser is not None:
            self._emit(self._parser.finish())
        self._show(self._stops.finish())
        self.finish = FinishReason.stop if self._stops.found is not None else finish
