"""What the routes stand on: the models by their names, and the way from a checked request to answers."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from ernie45.errors import ConfigError, ErnieError
from ernie45.machine import available_memory
from ernie45.models.memory import MemoryPlan, gib
from ernie45.server.access import Caller, Rates
from ernie45.server.failures import Failure, bad, failure_of, overloaded
from ernie45.server.fetch import Fetcher
from ernie45.server.journal import Journal
from ernie45.server.metrics import Metrics
from ernie45.server.model import ServedModel
from ernie45.server.prepare import Context, remote_pictures
from ernie45.server.protocol import ChatRequest
from ernie45.server.resume import Streams
from ernie45.server.settings import Limits, ServerSettings
from ernie45.server.ticket import Job, Ticket

T = TypeVar("T")
_SHOWN_NAMES = 50  # of adapters, in an error
_MEMORY_SHARE = 0.9  # of what is available when the server starts, unless it is told
_PREPARERS = 2  # threads that render, tokenise and compile grammars: hostile ones take these, and never the event loop


class Service:
    """All methods are for the event loop's thread.

    draining   no new requests are taken
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: Sequence[ServedModel],
        metrics: Metrics,
        journal: Journal,
        version: str = "",
        at_end: Sequence[Callable[[], None]] = (),
    ) -> None:
        """at_end: called, off the loop, when everything has ended."""
        self.settings = settings
        self.models = list(models)
        self.metrics = metrics
        self.journal = journal
        self.rates = Rates(settings.requests_per_minute, settings.tokens_per_minute)
        self._at_end = tuple(at_end)
        self.draining = False
        self.version = version
        self.memory = settings.memory_bytes or int(available_memory() * _MEMORY_SHARE)
        self.live: dict[str, list[Ticket]] = {}  # by the request's id, for cancelling
        self.streams = Streams(settings.limits)
        origins = settings.media_origins
        self._fetcher = Fetcher(origins, settings.limits.media_seconds) if origins else None
        self._threads = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="prepare")
        self._names: dict[str, ServedModel] = {}
        for model in models:
            for name in model.names:
                if name in self._names:
                    raise ConfigError(f"two models are called '{name}'; rename one with --served-model-name")
                self._names[name] = model
            model.memory = self.grant
        self._sharing = asyncio.Lock()
        self.began = self.now()
        metrics.watch(self.models)

    def find(self, name: str | None) -> tuple[ServedModel, str]:
        """A model by one of its names, and the adapter behind a colon or ""; None = the first, bare. Raises `Failure` 404."""
        if name is None:
            return self.models[0], ""
        if name in self._names:
            return self._names[name], ""
        base, _, adapter = name.rpartition(":")
        if (model := self._names.get(base)) is not None and model.adapters is not None:
            if model.adapters.holds(adapter):
                return model, adapter
            known = ", ".join(model.adapters.names()[:_SHOWN_NAMES]) or "none"
            what = f"the model {base} has no adapter '{adapter[:100]}'; there is: {known}"
            raise Failure(404, what, field="model", code="model_not_found")
        known = ", ".join(self._names)
        raise Failure(404, f"the model '{name[:120]}' is not served here; there is: {known}", field="model", code="model_not_found")

    @property
    def body_limits(self) -> Limits:
        """The limits of a request that may carry pictures: its body has room for them where a model sees."""
        limits = self.settings.limits
        if not any(model.text is not None and model.text.seeing is not None for model in self.models):
            return limits
        return replace(limits, body_bytes=limits.body_bytes + limits.images_bytes * 4 // 3)

    async def context(self, name: str | None, caller: Caller) -> tuple[ServedModel, Context]:
        """The model that is asked for, loaded, and what preparing needs. Raises `Failure`: 404, 429, 503."""
        if self.draining:
            raise overloaded("the server is shutting down", 5, "shutting_down")
        model, adapter = self.find(name)
        self.rates.admit(caller, self.now())
        info, text = await model.ready()
        return model, Context(info=info, text=text, limits=self.settings.limits, caller=caller, adapter=adapter)

    async def grant(self, model: ServedModel, plan: MemoryPlan) -> int:
        """Bytes that a model may take; models that nobody uses are unloaded for it, the one unused for longest first.

        Raises `Failure` 503 with the numbers: for good when it could never fit, else for as long as the others are busy.
        """
        async with self._sharing:
            while (left := self.memory - sum(other.granted for other in self.models)) < plan.least:
                if plan.least > self.memory:
                    what = f"needs {gib(plan.least)} ({plan.text()}), and all models together have {gib(self.memory)}"
                    raise Failure(503, f"the model {model.name} {what}", field="model", code="model_too_large")
                idle = [other for other in self.models if other is not model and other.state == "ready" and not other.busy]
                if not idle:
                    what = f"needs {gib(plan.least)}, {gib(left)} of {gib(self.memory)} are left and the other models are in use"
                    raise overloaded(f"the model {model.name} {what}", 5, "memory_in_use")
                leaving = min(idle, key=lambda other: other.used)
                self.journal.note("unload", model=leaving.name, reason=f"memory for {model.name}")
                await leaving.close()
            return plan.grant(left)

    async def prepare(self, make: Callable[..., T], *args: Any, fields: dict[str, str] | None = None) -> T:
        """Runs what takes a processor's time off the loop. Raises `Failure` 400 for the caller's mistakes."""
        seconds = self.settings.limits.grammar_seconds + self.settings.limits.read_seconds
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, make, *args)
        except TimeoutError:
            raise bad(f"the request could not be made ready within {seconds:g} s: it is too large, or its grammar too complex") from None
        except ErnieError as error:
            raise failure_of(error, fields) from None

    async def prepare_chat(
        self, make: Callable[..., T], chat: ChatRequest, context: Context, *args: Any, fields: dict[str, str] | None = None
    ) -> T:
        """As `prepare`, for what reads a conversation: its pictures that are elsewhere are fetched first. Raises `Failure` 400."""
        if self._fetcher is not None and (places := await self.prepare(remote_pictures, chat, context, fields=fields)):
            context = replace(context, fetched=await self._fetcher.all(places, context.limits.images_bytes))
        return await self.prepare(make, chat, context, *args, fields=fields)

    def admit(self, model: ServedModel, jobs: Sequence[Job], request_id: str) -> list[Ticket]:
        """Puts jobs in line. Raises `Failure`: 409 when the id is in use, 503 when the line is full."""
        if request_id in self.live:
            raise Failure(409, f"a request with the id '{request_id}' is being answered", field="request_id", code="id_in_use")
        tickets = [Ticket(job, self.now()) for job in jobs]
        model.admit(tickets)
        self.live[request_id] = tickets
        return tickets

    def release(self, model: ServedModel, tickets: Sequence[Ticket], request_id: str) -> None:
        """Whoever waited for these answers is done: what still runs is ended, what was used is counted."""
        self.live.pop(request_id, None)
        for ticket in tickets:
            model.cancel(ticket)
        if tickets:
            used = tickets[0].answer.prompt_tokens + sum(len(ticket.answer.ids) for ticket in tickets)
            self.rates.use(tickets[0].job.caller, used, self.now())

    def now(self) -> float:
        """The loop's clock."""
        return asyncio.get_running_loop().time()

    async def unload_idle(self, seconds: float) -> None:
        """For ever: unloads models, other than the first, that nobody has used for so long. They load again when they are asked for."""
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            for model in self.models[1:]:
                if model.state == "ready" and not model.busy and self.now() - model.used > seconds:
                    self.journal.note("unload", model=model.name)
                    await model.close()

    async def drain(self, seconds: float) -> None:
        """Takes nothing new and lets what runs go on for so long."""
        self.draining = True
        end = self.now() + seconds
        while self.now() < end and any(model.busy for model in self.models):
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Ends everything."""
        self.draining = True
        self.streams.close()
        await asyncio.gather(*(model.close() for model in self.models))
        for call in self._at_end:
            await asyncio.get_running_loop().run_in_executor(None, call)
        self._threads.shutdown(wait=False, cancel_futures=True)
