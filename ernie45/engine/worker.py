"""The engine's process: reads messages from an inherited socket, steps the engine, writes what came of it.

One thread. The socket never blocks it: what the front does not read yet waits here. It ends when the front closes the socket, or is gone.
"""

import gc
import json
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ernie45.config import from_mapping
from ernie45.engine.grammar import Grammars
from ernie45.engine.output import BankLoad, Output
from ernie45.engine.request import Request
from ernie45.engine.scheduler import Load, SchedulerConfig
from ernie45.engine.spawn import AHEAD, FAKE_NAME
from ernie45.engine.speculate import SpeculationConfig, check_mtp
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.engine.wire import (
    Cancel,
    Chosen,
    Embed,
    Embedded,
    EngineInfo,
    EngineSpec,
    Grant,
    LoadFailed,
    Loading,
    Planned,
    Ready,
    Refused,
    Stepped,
    Submit,
    ToEngine,
    Unpacker,
    pack,
)
from ernie45.errors import ErnieError, RequestError
from ernie45.machine import keep_to
from ernie45.models.memory import CACHE_SHARE, Held, MemoryPlan, check_fits, gib, plan_memory
from ernie45.tokens.pictures import PixelRules, read_pixel_rules

if TYPE_CHECKING:
    from ernie45.config import Environment
    from ernie45.engine.core import Engine, EngineConfig
    from ernie45.engine.threads import Seating
    from ernie45.models.compute import ComputeType
    from ernie45.models.load import Approve, LoadedModel, OpenModel

_READ = 1 << 20
_PROGRESS_SECONDS = 0.1
_EXPERTS_SECONDS = 2.0  # between two reports of the experts' load
_MAX_UNREAD = 256 << 20  # bytes the front has not read: it is stuck, and so is every client


class Steps(Protocol):
    """What is asked of an engine: `Engine` and `FakeEngine` both have it."""

    @property
    def idle(self) -> bool: ...
    @property
    def load(self) -> Load: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> bool: ...
    def step(self) -> tuple[Output, ...]: ...
    def embed(self, tokens: tuple[int, ...], adapter: str = "") -> list[float]: ...
    def experts_load(self) -> tuple[BankLoad, ...]: ...
    def verify(self) -> None: ...


class Gone(Exception):
    """The front has closed the socket."""


class Channel:
    """A socket that is read and written without blocking."""

    def __init__(self, link: socket.socket, kind: Any) -> None:
        link.setblocking(False)
        self._link = link
        self._unpacker = Unpacker(kind)
        self._unsent = bytearray()

    def expect(self, kind: Any) -> None:
        """From now on messages are of this kind."""
        self._unpacker = Unpacker(kind)

    def receive(self, timeout: float | None) -> list[Any]:
        """Messages that have come, after waiting at most `timeout` seconds (None: until something comes). Raises `Gone`."""
        messages: list[Any] = []
        while not messages:
            writing = [self._link] if self._unsent else []
            readable, writable, _ = select.select([self._link], writing, [], timeout)
            if writable:
                self._flush()
            if readable:
                try:
                    data = self._link.recv(_READ)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    raise Gone from None
                if not data:
                    raise Gone
                messages += self._unpacker.feed(data)
            elif timeout is not None:
                break
        return messages

    def send(self, message: Any) -> None:
        """Sends, or keeps for later. Raises `Gone`, also when the front has stopped reading."""
        self._unsent += pack(message)
        self._flush()
        if len(self._unsent) > _MAX_UNREAD:
            raise Gone

    def drain(self, seconds: float) -> None:
        """Waits until all is sent, at most so long."""
        end = time.monotonic() + seconds
        while self._unsent and time.monotonic() < end:
            select.select([], [self._link], [], max(0.0, end - time.monotonic()))
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._link.send(self._unsent)]
        except BlockingIOError:
            pass
        except ConnectionError:
            raise Gone from None


class Worker:
    """The loop over one engine. When it has nothing to do it proves that all pages are free, and sleeps."""

    def __init__(self, engine: Steps, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._texts: deque[Embed] = deque()
        self._told_experts = 0.0

    def run(self) -> None:
        """Until the front is gone (raises `Gone`)."""
        proven = False
        while True:
            busy = not self._engine.idle or bool(self._texts)
            if not busy and not proven:
                self._engine.verify()
            proven = not busy
            for message in self._channel.receive(0.0 if busy else None):
                self._handle(message)
            if self._texts:
                self._embed(self._texts.popleft())
            if not self._engine.idle:
                self._step()

    def _handle(self, message: Submit | Cancel | Embed) -> None:
        if isinstance(message, Cancel):
            if self._engine.cancel(message.id):
                self._channel.send(Stepped((), self._engine.load, 0.0))
        elif isinstance(message, Embed):
            self._texts.append(message)
        else:
            try:
                self._engine.submit(message.request)
            except ErnieError as error:
                self._channel.send(Refused(message.request.id, str(error), getattr(error, "field", None)))

    def _step(self) -> None:
        began = time.perf_counter()
        broke = False
        outputs: tuple[Output, ...] = ()
        try:
            outputs = self._engine.step()
        except Exception:  # noqa: BLE001  the step's requests have ended and the next call tells so; the others go on
            traceback.print_exc()
            broke = True
        now = time.perf_counter()
        self._channel.send(Stepped(outputs, self._engine.load, now - began, broke))
        if (now - self._told_experts > _EXPERTS_SECONDS or self._engine.idle) and (layers := self._engine.experts_load()):
            self._told_experts = now
            self._channel.send(Chosen(layers))

    def _embed(self, message: Embed) -> None:
        try:
            self._channel.send(Embedded(message.id, tuple(self._engine.embed(message.tokens, message.adapter))))
        except RequestError as error:
            self._channel.send(Refused(message.id, str(error), error.field))


class Laps:
    """How long each part of a start took."""

    def __init__(self) -> None:
        self._laps: list[str] = []
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """A part is over."""
        last, self._last = self._last, time.perf_counter()
        self._laps.append(f"{name} {self._last - last:.1f} s")

    def text(self) -> str:
        """All of them."""
        return ", ".join(self._laps)


def open_engine(spec: EngineSpec, channel: Channel, laps: Laps) -> tuple[Steps, EngineInfo]:
    """Loads what the spec names. Raises ErnieError subclasses."""
    if spec.model == FAKE_NAME:
        from ernie45.engine.fake import WIDTH, FakeEngine

        limits = SchedulerConfig(
            token_budget=spec.token_budget,
            idle_budget=spec.idle_budget,
            max_running=spec.max_running,
            page_size=spec.page_size,
            num_pages=spec.num_pages or 4096,
            max_length=spec.max_length or 8192,
            prefix_sharing=spec.prefix_sharing,
        )
        engine = FakeEngine(limits, step_seconds=spec.step_seconds)
        info = EngineInfo(
            name=FAKE_NAME,
            text_folder="",
            vocab_size=engine.tokenizer.vocab_size,
            width=WIDTH,
            eos_ids=engine.tokenizer.eos_ids,
            limits=limits,
            settings={"model": "fake: no weights, tokens are a function of place and seed"},
        )
        return engine, info
    return _open_real(spec, channel, laps)


def load_libraries() -> None:
    """What every engine but the fake needs: torch takes two seconds."""
    from ernie45.config import shorten_thread_waits

    shorten_thread_waits()
    import ernie45.engine.core
    import ernie45.engine.threads
    import ernie45.models.on_the_fly  # noqa: F401


def _open_real(spec: EngineSpec, channel: Channel, laps: Laps) -> tuple[Steps, EngineInfo]:
    told = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > _PROGRESS_SECONDS or done == total:
            told = now
            channel.send(Loading(stage, done, total))

    progress("starting", 0, 0)
    load_libraries()
    laps.end("libraries")
    from ernie45.config import Environment
    from ernie45.engine.core import Engine
    from ernie45.engine.draft_model import check_draft, load_draft
    from ernie45.engine.threads import Crew
    from ernie45.models.adapter_folder import AdapterFolder
    from ernie45.models.load import find_model
    from ernie45.tokens.tokenizer import load_tokenizer

    environment = Environment.read()
    keep_to(spec.cpus)
    crew = Crew(_threads(spec), cache=environment.cache_dir)
    path = find_model(spec.model, environment, lambda stage: progress(stage, 0, 0))
    config = _config(spec)
    folder_of_adapters = AdapterFolder(Path(spec.adapters)) if spec.adapters else None
    granted: tuple[MemoryPlan, int] | None = None
    check_mtp(config.speculation, spec.quantize)
    draft = load_draft(spec.draft_model, environment, spec.dtype) if spec.draft_model else None

    def approve(opened: "OpenModel", compute: "ComputeType", held: Held) -> None:
        nonlocal granted
        packed = opened.spec is not None or spec.quantize is not None
        how: dict[str, Any] = {"adapters": bool(spec.adapters), "packed": packed, "draft": draft}
        use = config.use(opened.config, compute.dtype, spec=opened.spec, stored=opened.stored, **how)
        plan = plan_memory(opened.described, held if draft is None else replace(held, total=held.total + draft.size), use)
        channel.send(Planned(plan, str(text_folder(opened, Path(spec.text_folder)))))
        (grant,) = channel.receive(None)
        assert isinstance(grant, Grant), "nothing else comes before the engine is ready"
        check_fits(plan, grant.size, spec.model, opened.described, use, packed=packed)
        granted = plan, grant.size
        crew.before_loading(plan.least)

    loaded = _load(spec, path, environment, progress, approve)
    assert granted is not None
    laps.end("weights")
    progress("threads", 0, 0)
    plan, size = granted
    seating = crew.after_loading(loaded.decoder, str(path))
    laps.end("threads")
    folder = text_folder(loaded.opened, Path(spec.text_folder))
    tokenizer = load_tokenizer(folder)
    check_draft(draft, tokenizer)
    rules = None
    if loaded.decoder.sight is not None:
        vision = loaded.decoder.sight.config
        rules = read_pixel_rules(folder, PixelRules(patch=vision.patch_size, merge=vision.merge))
    engine = Engine(
        loaded.decoder,
        config,
        available=_for_cache(plan, size),
        grammars=Grammars(tokenizer),
        adapters=folder_of_adapters,
        rules=rules,
        on_fault=lambda request_id, error: traceback.print_exception(error),
        draft=draft,
    )
    laps.end("tokenizer and cache")
    info = EngineInfo(
        name=path.stem if path.suffix == ".gguf" else path.resolve().name,
        text_folder=str(folder),
        vocab_size=engine.model.vocab_size,
        width=engine.model.hidden_size,
        eos_ids=tokenizer.eos_ids or engine.model.eos_ids,
        limits=engine.limits,
        settings=_told(spec, engine, loaded, plan, size) | {"threads": seating.text(), "start": laps.text()},
        rules=engine.rules,
        max_adapters=spec.max_adapters,
        speculative=spec.speculative,
        **_figures(loaded, plan, engine.limits.num_pages * engine.limits.page_size * engine.bytes_per_token, seating),
    )
    return engine, info


def _load(
    spec: EngineSpec, path: Path, environment: "Environment", progress: Callable[[str, int, int], None], approve: "Approve"
) -> "LoadedModel":
    from ernie45.models.load import load
    from ernie45.models.on_the_fly import load_quantised

    how: dict[str, Any] = {"dtype": spec.dtype, "text_only": spec.text_only, "environment": environment, "approve": approve}
    if spec.quantize is not None:
        return load_quantised(path, spec.quantize, progress=progress, **how)
    return load(
        path, mtp=spec.speculative == "mtp", compact=True, progress=lambda name, done, total: progress("weights", done, total), **how
    )


def _threads(spec: EngineSpec) -> ThreadSettings:
    return from_mapping(ThreadSettings, {"threads": spec.threads, "pin": spec.pin, "huge_pages": spec.huge_pages}, "engine")


def _figures(loaded: "LoadedModel", plan: MemoryPlan, cache: int, seating: "Seating") -> dict[str, Any]:
    """What is told as numbers: the model's size, who computes it, and the memory plan with the cache as it was granted."""
    from ernie45.models.counts import count_parameters

    count = count_parameters(loaded.opened.config, loaded.opened.vision)
    return {
        "parameters": count.total,
        "active_parameters": count.active_with_head,
        "dtype": loaded.compute.name,
        "threads": seating.threads,
        "cpus": seating.cpus,
        "memory": plan.parts() | {"cache": cache},
    }


def _config(spec: EngineSpec) -> "EngineConfig":
    """The engine's settings in a spec."""
    from ernie45.engine.core import EngineConfig

    return EngineConfig(
        page_size=spec.page_size,
        num_pages=spec.num_pages,
        max_length=spec.max_length,
        token_budget=spec.token_budget,
        idle_budget=spec.idle_budget,
        max_running=spec.max_running,
        prefix_sharing=spec.prefix_sharing,
        max_adapters=spec.max_adapters,
        adapter_bytes=spec.adapter_bytes,
        kv=spec.kv,
        huge_pages=spec.huge_pages == "on",
        speculation=SpeculationConfig(by=spec.speculative, draft_model=spec.draft_model, most=spec.draft_tokens),
    )


def _told(spec: EngineSpec, engine: "Engine", loaded: "LoadedModel", plan: MemoryPlan, size: int) -> dict[str, str]:
    """What was resolved, for people to read; `size` bytes were granted."""
    from ernie45 import ops

    limits = engine.limits
    cache = limits.num_pages * limits.page_size * engine.bytes_per_token
    return {
        "model": spec.model,
        "compute": str(loaded.compute),
        "memory": f"{plan.text(cache)}, together at most {gib(plan.fixed + cache)}; {gib(size)} were granted",
        **({"unseen": loaded.opened.unseen} if loaded.opened.unseen else {}),
        "cache": (
            f"{limits.num_pages:,} pages of {limits.page_size} tokens: {limits.num_pages * limits.page_size:,} tokens, "
            f"or {limits.num_pages * limits.page_size // limits.max_length} sequences of {limits.max_length:,}; "
            f"at most {gib(cache)}, taken as it fills"
        ),
        "context": f"{limits.max_length:,} tokens",
        "step": limits.describe(),
        "kernels": ops.describe(),
        **({} if spec.speculative == "off" else {"drafts": _config(spec).speculation.text()}),
    }


def _for_cache(plan: MemoryPlan, size: int) -> int:
    """What `EngineConfig.resolve` takes half of: the granted cache, doubled."""
    return int((size - plan.fixed) / CACHE_SHARE)


def text_folder(opened: "OpenModel", made: Path) -> Path:
    """Where the model's tokenizer files are: its own folder, or `made`, filled from a GGUF file's metadata."""
    from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf
    from ernie45.weights.gguf import GgufFile

    if not isinstance(opened.files, GgufFile):
        return opened.path
    tokenizer, settings = tokenizer_from_gguf(opened.files.metadata)
    (made / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (made / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return made


def main(fd: int, *, ahead: bool = False) -> int:
    """The process: spec in, engine up, loop. ahead: the spec comes later, and is not for the fake."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when to stop: it drains first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd), EngineSpec)
    laps = Laps()
    try:
        if ahead:
            load_libraries()
        (spec,) = channel.receive(None)
        channel.expect(ToEngine)
        try:
            engine, info = open_engine(spec, channel, laps)
        except ErnieError as error:
            channel.send(LoadFailed(str(error), True))
            channel.drain(5.0)
            return 2
        gc.freeze()  # the model stays: nobody needs to look through it again and again for what could be freed
        channel.send(Ready(info))
        Worker(engine, channel).run()
    except Gone:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), ahead=AHEAD in sys.argv[2:]))
