"""One answer under way: from the line, through the engine, to whoever reads it. Fed by the engine's messages, read by one coroutine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

from ernie45.engine.answer import Answer
from ernie45.engine.output import Output, TokenLogprobs
from ernie45.engine.request import FinishReason, Request
from ernie45.server.access import Caller
from ernie45.server.failures import Failure, bad, engine_lost
from ernie45.tokens.parse import Delta


class State(Enum):
    """Where a ticket is."""

    waiting = "waiting"
    running = "running"
    over = "over"


class Piece(NamedTuple):
    """What is new of an answer: text, the ids and log probabilities behind it, and the tokens so far. Pieces may have no text."""

    deltas: tuple[Delta, ...]
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be answered, ready for the engine.

    request   what the engine gets;  answer: what takes in the engine's outputs, made for that request
    after     the grammar for the rest, when a thinking budget closes the thinking; None = the request's own
    one_call  the answer ends with its first tool call
    """

    request: Request
    answer: Answer
    caller: Caller
    after: str | None = None
    one_call: bool = False


def _failure(finish: FinishReason, id: str) -> Failure | None:
    """What the caller is told of an answer that did not end well."""
    if finish is FinishReason.grammar:
        what = "the shape of the answer became too complex on the way, or bad_words forbids all that it allows; ask for a simpler one"
        return bad(what, code="grammar_failed")
    return engine_lost(id) if finish is FinishReason.error else None


class Host(Protocol):
    """Whoever runs tickets: the engine goes on with another request for one, or need not go on."""

    def resubmit(self, ticket: "Ticket", request: Request) -> None: ...
    def stop(self, ticket: "Ticket") -> None: ...


class Ticket:
    """All methods are for the event loop's thread.

    answer    what there is of it
    id        the engine's name for it; another one when it goes on behind a closed thinking
    failure   why it ended without an answer
    came, began, first, ended   seconds of the loop's clock: put in line, handed to the engine, first token, over
    gap       seconds between its last two outputs with tokens
    timer     ends it when it waits or runs too long;  counted: the metrics know it
    shortcut  asked when there is news and its reader waits for nothing else: True when it took the news, and the reader may sleep on
    """

    def __init__(self, job: Job, now: float) -> None:
        self.job = job
        self.answer = job.answer
        self.id = job.request.id
        self.state = State.waiting
        self.failure: Failure | None = None
        self.came = now
        self.began: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.gap: float | None = None
        self._fed: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.counted = False
        self.shortcut: Callable[[], bool] | None = None
        self._news = False  # something came that was not told
        self._reader: asyncio.Future[None] | None = None  # who waits for news, or for the end alone
        self._patient = False
        self._told_ids = 0
        self._told_logprobs = 0

    def feed(self, output: Output, now: float, host: Host) -> None:
        """An output of the engine."""
        if output.tokens:
            self.first = now if self.first is None else self.first
            self.gap = None if self._fed is None else now - self._fed
            self._fed = now
        if len(output.tokens) < 2:
            self._take(output, now, host)
        else:
            for single in output.one_by_one():
                if not self._take(single, now, host):
                    break
        self._tell()

    def _take(self, output: Output, now: float, host: Host) -> bool:
        """Takes in at most one token; True when the one behind it counts."""
        answer = self.answer
        answer.take(output, now)
        if over_budget := answer.over_budget:
            host.stop(self)
            following = answer.closing()
            if following is not None:
                host.resubmit(self, following if self.job.after is None else replace(following, grammar=self.job.after))
        if answer.finish is None and self.job.one_call and answer.calls_done:
            answer.stop_here()
        if answer.finish is not None:
            if output.finish is None:
                host.stop(self)
            self.over(now, _failure(answer.finish, self.id))
        return not over_budget and answer.finish is None

    def over(self, now: float, failure: Failure | None = None) -> None:
        """Nothing more will come."""
        if self.state is not State.over:
            self.state = State.over
            self.ended = now
            self.failure = failure
            self.answer.cancel()
            if self.timer is not None:
                self.timer.cancel()
            self._tell()

    def begin(self, now: float) -> None:
        """The engine has it from now on."""
        self.state, self.began = State.running, now
        self._tell()

    def _tell(self) -> None:
        reader = self._reader
        if reader is None or reader.done():
            self._news = True
        elif self.state is State.over or not (self._patient or (self.shortcut is not None and self.shortcut())):
            self._news = True
            reader.set_result(None)

    async def _wait(self, patient: bool = False) -> None:
        """Until there is news; patient: until it is over."""
        assert self._reader is None, "a ticket has one reader"
        self._patient = patient
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def begun(self) -> None:
        """Until it leaves the line. Raises `Failure` when the engine never had it; what fails later is told by `next`."""
        while self.state is State.waiting:
            await self._wait()
        if self.failure is not None and self.began is None:
            raise self.failure

    async def next(self) -> Piece | None:
        """What came since the last call, waiting for it; None when the answer is over and told. Raises `Failure`."""
        while True:
            if self._news:
                self._news = False
                piece = self.take()
                if piece.deltas or piece.ids:
                    return piece
            if self.failure is not None:
                raise self.failure
            if self.state is State.over:
                return None
            await self._wait()

    async def wait(self) -> None:
        """Until it is over. Raises `Failure`."""
        if self.state is not State.over:
            await self._wait(patient=True)
        if self.failure is not None:
            raise self.failure

    def take(self) -> Piece:
        """What came since the last call."""
        ids, logprobs = self.answer.ids, self.answer.logprobs
        piece = Piece(tuple(self.answer.deltas()), tuple(ids[self._told_ids :]), tuple(logprobs[self._told_logprobs :]), len(ids))
        self._told_ids, self._told_logprobs = len(ids), len(logprobs)
        return piece
