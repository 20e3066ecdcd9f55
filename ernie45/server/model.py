"""One served model: its text side here, its engine in a process of its own, and the line between them.

cold -> loading -> ready -> (idle for long) cold
             \\-> failed: the text says why, and a later request tries again
"""

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ernie45.config import read_table
from ernie45.engine.fake import fake_template, fake_tokenizer
from ernie45.engine.grammar import Grammars
from ernie45.engine.output import BankLoad
from ernie45.engine.process import EngineDied
from ernie45.engine.request import Request
from ernie45.engine.scheduler import Load
from ernie45.engine.wire import Chosen, Embedded, EngineInfo, Refused, Stepped
from ernie45.errors import CheckpointError, ErnieError, RequestError
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.models.memory import MemoryPlan
from ernie45.server.failures import Failure, engine_lost, failure_of, overloaded
from ernie45.server.line import Line
from ernie45.server.seeing import Seeing
from ernie45.server.settings import Limits
from ernie45.server.ticket import State, Ticket
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.template import ChatTemplate, load_template
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer

_RESTARTS = 5  # in a row, without an answer between them: then the model stays down until somebody asks for it
_USUAL_TOKENS = 256  # what an answer without max_tokens is taken to cost in the line


class Engine(Protocol):
    """An engine elsewhere: `engine.process.EngineProcess`, or one that tests step by hand."""

    async def start(self) -> EngineInfo: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def embed(self, id: str, tokens: tuple[int, ...], adapter: str) -> None: ...
    async def stop(self) -> None: ...


class Opener(Protocol):
    """Makes an engine for a model that has not been started yet."""

    def __call__(
        self,
        model: str,
        text_folder: str,
        *,
        on_message: Callable[[Stepped | Refused | Embedded | Chosen], None],
        on_death: Callable[[str], None],
        on_loading: Callable[[str, int, int], None],
        on_planned: Callable[[MemoryPlan], Awaitable[int]],
        on_found: Callable[[str], None],
    ) -> Engine: ...


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """What turns text into ids and back, and what the model's folder recommends."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    without_template: str
    grammars: Grammars
    sampling: Mapping[str, Any]
    seeing: Seeing | None = None

    def seeing_by(self, rules: PixelRules | None, limits: Limits, media_folder: Path | None) -> "TextSide":
        """With eyes, for a model that has them and a template that says where pictures stand."""
        can_write = self.template is not None and (self.template.family is None or self.template.family.media)
        return replace(self, seeing=Seeing(rules, limits, media_folder)) if rules is not None and can_write else self


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of the engine came to, at `now` seconds of the loop's clock.

    written   tokens of answers;  read: tokens of prompts that were computed
    gaps      of the answers that grew and had begun before: seconds since they last grew -> how many
    """

    message: Stepped
    now: float
    written: int
    read: int
    gaps: Mapping[float, int]


class Observer(Protocol):
    """Who is told what happens; the metrics."""

    def stepped(self, model: str, step: "Step") -> None: ...
    def finished(self, model: str, ticket: Ticket) -> None: ...


class Memory(Protocol):
    """Who shares out memory between models; the service."""

    async def __call__(self, model: "ServedModel", plan: MemoryPlan) -> int: ...


class ServedModel:
    """All methods are for the event loop's thread.

    name     what it was started as;  names: what clients may call it
    state    "cold", "loading", "ready" or "failed";  trouble: why it failed
    """

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        opener: Opener,
        limits: Limits,
        observer: Observer,
        *,
        chat_format: str | None = None,
        adapters: AdapterFolder | None = None,
        media_folder: Path | None = None,
    ) -> None:
        self.source = source
        self.names = tuple(names)
        self.adapters = adapters
        self.state = "cold"
        self.trouble = ""
        self.created = int(time.time())
        self.granted = 0  # bytes of memory, weights and all
        self.memory: Memory = _all_of_it
        self._refusal: Failure | None = None
        self.progress = ("", 0, 0)
        self.info: EngineInfo | None = None
        self.text: TextSide | None = None
        self.load: Load | None = None
        self.experts: tuple[BankLoad, ...] = ()  # how often each expert was chosen
        self.written = 0  # tokens of answers since the start
        self.used = asyncio.get_running_loop().time()
        self._opener = opener
        self._limits = limits
        self._observer = observer
        self._chat_format = chat_format
        self._media_folder = media_folder
        self._engine: Engine | None = None
        self._opening: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[TextSide] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._line: Line[Ticket] = Line(limits.queue)
        self._running: dict[str, Ticket] = {}
        self._embeddings: dict[str, asyncio.Future[tuple[float, ...]]] = {}
        self._numbers = itertools.count()
        self._deaths = 0
        self._pace = 1.0  # seconds a request takes, smoothed: what Retry-After is reckoned from

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def busy(self) -> int:
        """Requests that wait or run."""
        return len(self._line) + len(self._running) + len(self._embeddings)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Requests the engine has."""
        return len(self._running)

    # ---- up and down

    async def ready(self) -> tuple[EngineInfo, TextSide]:
        """Loads it if need be. Raises `Failure` 503 while it loads or when it cannot be loaded."""
        self.used = asyncio.get_running_loop().time()
        if self.state in ("cold", "failed"):
            self.open()
        if self.state == "loading":
            assert self._opening is not None
            done, _ = await asyncio.wait([self._opening], timeout=1.0)  # a small model is ready sooner than a client comes back
            if not done:
                raise overloaded(f"the model {self.name} is being loaded", 5, "model_loading")
        if self.state != "ready":
            if self._refusal is not None:
                raise self._refusal
            raise Failure(503, f"the model {self.name} could not be loaded; the server's log says why", code="model_failed")
        assert self.info is not None
        assert self.text is not None
        return self.info, self.text

    def open(self) -> asyncio.Task[None]:
        """Begins to load it; the task ends when it is ready or failed."""
        self.state, self.trouble, self._refusal = "loading", "", None
        self._opening = asyncio.get_running_loop().create_task(self._open())
        return self._opening

    async def _open(self) -> None:
        dead, self._engine = self._engine, None
        if dead is not None:
            await dead.stop()
        self._tidy()
        self._folder = tempfile.TemporaryDirectory(prefix="ernie45-")
        engine = self._opener(
            self.source,
            self._folder.name,
            on_message=self._on_message,
            on_death=self._on_death,
            on_loading=self._on_loading,
            on_planned=self._on_planned,
            on_found=self._on_found,
        )
        self._reading = None
        try:
            self.info = await engine.start()
            if self._reading is None:
                self._on_found(self.info.text_folder)
            assert self._reading is not None
            self.text = (await self._reading).seeing_by(self.info.rules, self._limits, self._media_folder)
        except (ErnieError, EngineDied) as error:
            self.state, self.trouble, self.granted = "failed", str(error), 0
            self._refusal = error if isinstance(error, Failure) else None
            await engine.stop()
            return
        except BaseException:
            await engine.stop()
            raise
        self._engine = engine
        self.state = "ready"
        self._fill()

    async def close(self) -> None:
        """Ends what runs, and the engine's process."""
        self._fail_all(overloaded("the server is shutting down", 5, "shutting_down"))
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._opening
        engine, self._engine = self._engine, None
        self.state = "cold"
        if engine is not None:
            await engine.stop()
        self.granted = 0
        self._tidy()

    def _tidy(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _on_loading(self, stage: str, done: int, total: int) -> None:
        self.progress = (stage, done, total)

    def _on_found(self, folder: str) -> None:
        """The text side is read here while the engine reads the weights."""
        self._reading = asyncio.ensure_future(asyncio.to_thread(read_text_side, folder, self._chat_format))
        self._reading.add_done_callback(lambda reading: reading.cancelled() or reading.exception())  # nobody may want it any more

    async def _on_planned(self, plan: MemoryPlan) -> int:
        self.granted = 0
        self.granted = await self.memory(self, plan)
        return self.granted

    def _on_death(self, why: str) -> None:
        """What ran is lost; what waits stays in line for the next process."""
        self.state, self.trouble = "failed", why
        self._deaths += 1
        for ticket in list(self._running.values()):
            self._end(ticket, engine_lost(ticket.id))
        for future in self._embeddings.values():
            if not future.done():
                future.set_exception(engine_lost("embedding"))
        self._embeddings.clear()
        if self._deaths <= _RESTARTS:
            self.open()
        else:
            self._fail_all(engine_lost("restarts"))

    # ---- requests

    def number(self) -> str:
        """An id for the engine, never used twice."""
        return f"{next(self._numbers)}"

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Puts all of them in line, or none. Raises `Failure` 503 when there is no room."""
        loop = asyncio.get_running_loop()
        if self.state != "ready" or self.info is None:
            raise overloaded(f"the model {self.name} is not ready", 5, "model_loading")
        slots = self.info.limits.max_running
        free = max(0, slots - len(self._running)) if not len(self._line) else 0
        if not self._line.room(len(tickets) - min(free, len(tickets))):
            wait = min(60.0, self._pace * (1 + len(self._line)) / slots)
            raise overloaded(f"{len(self._line)} requests wait for the model already; at most {self._line.most} may", wait, "queue_full")
        for ticket in tickets:
            request = ticket.job.request
            size = len(request.prompt) + (request.params.max_tokens or _USUAL_TOKENS)
            self._line.add(ticket, ticket.job.caller.name, request.priority, size)
            ticket.timer = loop.call_later(self._limits.queue_seconds, self._too_long_in_line, ticket)
        self._fill()

    def has(self, ticket: Ticket) -> bool:
        """Whether the engine has it, or it stands in this line."""
        return self._running.get(ticket.id) is ticket or self._line.holds(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Ends an answer that nobody waits for any more. What it held is free before the engine's next step."""
        if ticket.state is State.running:
            self.stop(ticket)
        if ticket.state is not State.over:
            self._end(ticket)
            self._fill()

    async def embed(self, tokens: tuple[int, ...], adapter: str = "") -> tuple[float, ...]:
        """A text as a vector. Raises `Failure`."""
        if self.busy >= self._limits.queue:
            raise overloaded("too many requests wait for the model", self._pace, "queue_full")
        if self.state != "ready" or self._engine is None:
            raise overloaded(f"the model {self.name} is not ready", 5, "model_loading")
        id = self.number()
        future: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()
        self._embeddings[id] = future
        self._engine.embed(id, tokens, adapter)
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                return await future
        except TimeoutError:
            raise Failure(504, "the embedding took too long", code="request_timeout") from None
        finally:
            self._embeddings.pop(id, None)

    def _fill(self) -> None:
        """Hands waiting requests to the engine, as many as it computes at a time."""
        while (
            self.state == "ready"
            and self._engine is not None
            and self.info is not None
            and len(self._running) < self.info.limits.max_running
        ):
            following = self._line.peek()
            if following is None or not self._has_adapter_room(following.job.request.adapter):
                return
            ticket = self._line.take()
            assert ticket is following
            now = asyncio.get_running_loop().time()
            if ticket.timer is not None:
                ticket.timer.cancel()
            left = max(0.0, ticket.came + self._limits.request_seconds - now)
            ticket.timer = asyncio.get_running_loop().call_later(left, self._too_long, ticket)
            ticket.begin(now)
            self._running[ticket.id] = ticket
            self._engine.submit(ticket.job.request)

    def _has_adapter_room(self, adapter: str) -> bool:
        """Whether the engine can hold one more adapter, or has this one. Whoever waits for room keeps the place, so room comes."""
        used = {ticket.job.request.adapter for ticket in self._running.values()} - {""}
        assert self.info is not None
        return not adapter or adapter in used or len(used) < self.info.max_adapters

    def _on_message(self, message: Stepped | Refused | Embedded | Chosen) -> None:
        if isinstance(message, Stepped):
            self._on_step(message)
        elif isinstance(message, Chosen):
            self.experts = message.layers
        elif isinstance(message, Embedded):
            if (future := self._embeddings.get(message.id)) is not None and not future.done():
                future.set_result(message.vector)
        else:
            failure = failure_of(RequestError(message.text, message.field))
            if (future := self._embeddings.get(message.id)) is not None and not future.done():
                future.set_exception(failure)
            if (ticket := self._running.get(message.id)) is not None:
                self._end(ticket, failure)

    def _on_step(self, message: Stepped) -> None:
        read = message.load.read_tokens - (self.load.read_tokens if self.load is not None else 0)
        self.load = message.load
        self._deaths = 0 if message.outputs else self._deaths
        now = asyncio.get_running_loop().time()
        gaps: dict[float, int] = {}  # answers that grow together have the same
        before = self.written
        for output in message.outputs:
            self.written += len(output.tokens)
            ticket = self._running.get(output.request_id)
            if ticket is None:  # it was cancelled while the step ran
                continue
            assert self._engine is not None
            ticket.feed(output, now, self)
            if output.tokens and ticket.gap is not None:
                gaps[ticket.gap] = gaps.get(ticket.gap, 0) + 1
            if ticket.state is State.over:
                self._end(ticket)
        self._observer.stepped(self.name, Step(message, now, self.written - before, max(0, read), gaps))
        self._fill()

    def resubmit(self, ticket: Ticket, request: Request) -> None:
        """Goes on with another request. Under another id: what the engine wrote before it heard of the end is still on its way here."""
        assert self._engine is not None
        del self._running[ticket.id]
        ticket.id = self.number()
        self._running[ticket.id] = ticket
        self._engine.submit(replace(request, id=ticket.id))

    def stop(self, ticket: Ticket) -> None:
        """The engine need not go on with it."""
        if self._engine is not None:
            self._engine.cancel(ticket.id)

    def _end(self, ticket: Ticket, failure: Failure | None = None) -> None:
        """Takes a ticket out of wherever it is, and counts it once."""
        now = asyncio.get_running_loop().time()
        self.used = now
        if self._running.pop(ticket.id, None) is None:
            self._line.remove(ticket)
        elif ticket.began is not None:
            self._pace += 0.1 * (now - ticket.began - self._pace)
        ticket.over(now, failure)
        if not ticket.counted:
            ticket.counted = True
            self._observer.finished(self.name, ticket)

    def _fail_all(self, failure: Failure) -> None:
        while (ticket := self._line.take()) is not None:
            self._end(ticket, failure)
        for ticket in list(self._running.values()):
            self.stop(ticket)
            self._end(ticket, failure)

    def _too_long_in_line(self, ticket: Ticket) -> None:
        seconds = self._limits.queue_seconds
        self._end(ticket, Failure(504, f"the request waited {seconds:g} s for the model, the longest it may", code="queue_timeout"))

    def _too_long(self, ticket: Ticket) -> None:
        seconds = self._limits.request_seconds
        self.stop(ticket)
        self._end(ticket, Failure(504, f"the request took {seconds:g} s, the longest it may", code="request_timeout"))


async def _all_of_it(model: ServedModel, plan: MemoryPlan) -> int:
    return plan.total


def read_text_side(text_folder: str, chat_format: str | None) -> TextSide:
    """Tokenizer, template and sampling from a folder; none: those of the fake. Raises ErnieError subclasses."""
    if not text_folder:
        tokenizer = fake_tokenizer()
        template = fake_template(tokenizer, chat_format)
        return TextSide(tokenizer=tokenizer, template=template, without_template="", grammars=Grammars(tokenizer), sampling={})
    folder = Path(text_folder)
    tokenizer = load_tokenizer(folder)
    template, without = None, ""
    try:
        template = load_template(folder, tokenizer, chat_format)
    except CheckpointError as error:
        without = str(error)
    return TextSide(
        tokenizer=tokenizer,
        template=template,
        without_template=without,
        grammars=Grammars(tokenizer),
        sampling=read_sampling(folder),
    )


def read_sampling(folder: Path) -> dict[str, Any]:
    """The sampling that generation_config.json recommends; empty without one. Raises `CheckpointError` when it is damaged."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    data = read_table(path)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    found = {name: data[name] for name in names if data.get(name) is not None}
    if data.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
