"""A whole server in this process, on a port of its own, over the fake engine: fast, and every step can be held back."""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import httpx
import pytest

from ernie45.config import Environment
from ernie45.engine.fake import WIDTH, FakeEngine
from ernie45.engine.scheduler import SchedulerConfig
from ernie45.engine.wire import Embedded, EngineInfo, Refused, Stepped
from ernie45.errors import ErnieError
from ernie45.server.build import build
from ernie45.server.listener import listen, make_server
from ernie45.server.settings import Limits, ServerSettings

LIMITS = SchedulerConfig(token_budget=64, max_running=4, page_size=8, num_pages=128, max_length=512)


class HandEngine:
    """The fake engine inside the server's loop. hold(): no steps until release(); what it did is there to be looked at."""

    def __init__(self, limits, fails, loads, speculative):
        self.fake = FakeEngine(limits, new_seed=lambda: 7, fails=fails)
        self.limits = limits
        self.held = threading.Event()
        self.steps = 0
        self.submitted = []
        self.speculative = speculative
        self._loads = loads
        self._awake = asyncio.Event()
        self._task = None
        self.dies = lambda: None

    def listen(self, on_message, on_death):
        self.tell, self.dies = on_message, on_death

    async def start(self):
        await self._loads()
        self._task = asyncio.ensure_future(self._run())
        tokenizer = self.fake.tokenizer
        return EngineInfo(
            name="fake",
            text_folder="",
            vocab_size=tokenizer.vocab_size,
            width=WIDTH,
            eos_ids=tokenizer.eos_ids,
            limits=self.limits,
            settings={"model": "by hand"},
            speculative=self.speculative,
        )

    def submit(self, request):
        self.submitted.append(request)
        try:
            self.fake.submit(request)
        except ErnieError as error:
            asyncio.get_running_loop().call_soon(self.tell, Refused(request.id, str(error), getattr(error, "field", None)))
        self._awake.set()

    def cancel(self, request_id):
        self.fake.cancel(request_id)

    def embed(self, id, tokens, adapter=""):
        loop = asyncio.get_running_loop()
        try:
            loop.call_soon(self.tell, Embedded(id, tuple(self.fake.embed(tokens, adapter))))
        except ErnieError as error:
            loop.call_soon(self.tell, Refused(id, str(error), getattr(error, "field", None)))

    async def stop(self):
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self):
        while True:
            await self._awake.wait()
            self._awake.clear()
            while not self.fake.idle:
                if self.held.is_set():
                    await asyncio.sleep(0.002)
                    continue
                outputs = self.fake.step()
                self.steps += 1
                self.tell(Stepped(outputs, self.fake.load, 0.001))
                await asyncio.sleep(0)


@dataclass
class Running:
    """A server that runs: its address, its service, its engines by model, its log lines."""

    url: str
    service: object
    engines: dict
    lines: list
    loop: asyncio.AbstractEventLoop
    server: object
    clients: list = field(default_factory=list)

    @property
    def engine(self):
        return next(iter(self.engines.values()))

    def client(self, **options):
        made = httpx.Client(base_url=self.url, timeout=120, **options)
        self.clients.append(made)
        return made

    def post(self, path, body, **options):
        return self.client().post(path, json=body, **options)

    def chat(self, text="«hello»", **fields):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def do(self, coroutine):
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def log(self, event="request"):
        return [line for line in map(json.loads, self.lines) if line["event"] == event]


@contextmanager
def servers():
    """Gives a function that starts servers; stops them at the end, and proves that nothing is left in their engines."""
    stops = []

    def start(
        models=("fake",),
        chat_format=None,
        engine_limits=LIMITS,
        fails=lambda request: False,
        loads=None,
        keys=(),
        limits=None,
        plans=None,
        speculative="off",
        **settings,
    ):
        started, state = threading.Event(), {}

        async def nothing():
            return None

        async def main():
            engines, lines = {}, []

            def opener(model, text_folder, *, on_message, on_death, on_loading, on_planned, on_found):
                async def load():
                    await (loads or nothing)()
                    if plans is not None:
                        await on_planned(plans[model])

                engines[model] = HandEngine(engine_limits, fails, load, speculative)
                engines[model].listen(on_message, on_death)
                return engines[model]

            environment = replace(Environment.read({"HOME": "."}), api_keys=tuple(keys))
            try:
                made = ServerSettings(port=0, limits=Limits(**(limits or {})), **settings)
                service, app = build(models, made, environment, chat_format=chat_format, opener=opener, write=lines.append)
            except ErnieError as error:
                state["error"] = error
                started.set()
                return
            link = listen(made)
            server = make_server(app, made)
            server.capture_signals = _no_signals
            task = asyncio.ensure_future(server.serve(sockets=[link]))
            while not server.started:
                await asyncio.sleep(0.001)
            if loads is None:
                await service.models[0].open()
            host, port = link.getsockname()[:2]
            state["running"] = Running(f"http://{host}:{port}", service, engines, lines, asyncio.get_running_loop(), server)
            started.set()
            await task

        thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        thread.start()
        assert started.wait(120)  # shared machines stand still for a minute at times
        if "error" in state:
            thread.join()
            raise state["error"]
        running = state["running"]
        stops.append((running, thread))
        return running

    yield start
    for running, thread in stops:
        for client in running.clients:
            client.close()
        for engine in running.engines.values():
            engine.held.clear()
        running.server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
        for engine in running.engines.values():
            engine.fake.verify()
            assert engine.fake.idle, "the server left requests in the engine"


class _no_signals:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def serve():
    """Starts servers: serve(settings..., models=, chat_format=, engine_limits=, fails=, loads=, keys=)."""
    with servers() as start:
        yield start


@pytest.fixture
def running(serve):
    """A server with the settings it has by itself."""
    return serve()


@pytest.fixture(scope="module")
def shared():
    """The same for all tests of a file, which may leave nothing behind that another would see."""
    with servers() as start:
        yield start()


@pytest.fixture(scope="module")
def roomy():
    """As `shared`, with tools and thinking, and room for the long prompts that they make."""
    limits = SchedulerConfig(token_budget=256, max_running=4, page_size=16, num_pages=512, max_length=4096)
    with servers() as start:
        yield start(chat_format="ernie-vl-thinking", engine_limits=limits)


@pytest.fixture
def events():
    """The JSON values of a text of server-sent events; "[DONE]" as it is."""

    def read(text):
        data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    return read


@pytest.fixture
def until():
    """Waits for something to become true."""
    import time

    def wait(condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.005)

    return wait
