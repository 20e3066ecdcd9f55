"""The engine in a process of its own: messages there and back, damaged ones, and what happens when a side goes away."""

import ast
import asyncio
import os
import signal
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.output import Output, TokenLogprobs
from ernie45.engine.process import EngineProcess
from ernie45.engine.request import FinishReason, Request, SamplingParams
from ernie45.engine.scheduler import Load
from ernie45.engine.wire import MAX_FRAME, Cancel, Embedded, EngineSpec, FromEngine, Refused, Stepped, Submit, ToEngine, Unpacker, pack
from ernie45.engine.worker import Channel, Gone
from ernie45.errors import CheckpointError
from tests.engine.peft_adapters import merged, random_factors, write
from tests.engine.test_engine import DENSE, build
from tests.engine.tiny_folder import save_tiny

LOAD = Load(running=1, waiting=0, free_pages=3, kept_pages=1, num_pages=4, preemptions=0, prompt_tokens=5, cached_tokens=0, read_tokens=5)
REQUEST = Request(
    id="a", prompt=(5, 6), params=SamplingParams(logit_bias={7: -1.5}, bad_words=((1, 2),), stop=("x",), seed=-3), eos_ids=(2,), grammar="g"
)
OUTPUT = Output("a", (5,), (TokenLogprobs(5, -0.5, ((5, -0.5),)),), (), FinishReason.stop, 3)


@pytest.mark.parametrize("cut", [1, 3, 7, 10_000])
def test_messages_arrive_whatever_the_pieces(cut):
    sent = [Submit(REQUEST), Cancel("b")]
    data = b"".join(map(pack, sent))
    unpacker, got = Unpacker(ToEngine), []
    for start in range(0, len(data), cut):
        got += unpacker.feed(data[start : start + cut])
    assert got == sent
    back = [Stepped((OUTPUT,), LOAD, 0.5), Refused("a", "no", None), Embedded("b", (0.5,))]
    assert Unpacker(FromEngine).feed(b"".join(map(pack, back))) == back


@given(st.binary(max_size=200))
def test_noise_is_an_error_or_waits_for_more(noise):
    framed = len(noise).to_bytes(4, "big") + noise
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        Unpacker(ToEngine).feed(framed)


def test_a_frame_that_is_too_large_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="frame"):
        Unpacker(ToEngine).feed((MAX_FRAME + 1).to_bytes(4, "big"))


def test_a_message_of_wrong_types_is_refused():
    wrong = pack({"type": "cancel", "id": 5})
    with pytest.raises(msgspec.ValidationError):
        Unpacker(ToEngine).feed(wrong)


def test_a_front_that_does_not_read_does_not_block_the_engine():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs, ToEngine)
        for _ in range(200):
            channel.send(Refused("a", "x" * 10_000, None))
        unpacker, got = Unpacker(FromEngine), []
        ours.setblocking(False)
        while len(got) < 200:
            got += unpacker.feed(ours.recv(1 << 20))
            channel.receive(0.0)
    with pytest.raises((Gone, OSError, ValueError)):
        channel.send(Cancel("x"))


class Front:
    """What a server sees of an engine process."""

    def __init__(self, **spec):
        self.messages, self.deaths, self.heard = [], [], asyncio.Event()
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        self.memory = spec.pop("memory", None)
        stuck = spec.pop("stuck_seconds", 60.0)
        self.engine = EngineProcess(
            EngineSpec(text_folder="", **({"model": "fake", "threads": 1} | spec)),
            environment,
            on_message=self._hear,
            on_death=self._die,
            on_planned=self._plan,
            stuck_seconds=stuck,
        )

    async def _plan(self, plan):
        self.plan = plan
        return self.memory or plan.fixed + plan.cache

    def _hear(self, message):
        self.messages.append(message)
        self.heard.set()

    def _die(self, why):
        self.deaths.append(why)
        self.heard.set()

    async def until(self, condition):
        async with asyncio.timeout(30):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    def tokens(self, id):
        return [t for m in self.messages if isinstance(m, Stepped) for o in m.outputs if o.request_id == id for t in o.tokens]

    def ended(self, id):
        return any(o.finish for m in self.messages if isinstance(m, Stepped) for o in m.outputs if o.request_id == id)


def test_requests_embeddings_refusals_and_cancelling():
    async def main():
        front = Front()
        info = await front.engine.start()
        assert info.name == "fake"
        prompt = tuple(range(5, 40))
        front.engine.submit(Request(id="a", prompt=prompt, params=SamplingParams(max_tokens=5, seed=1), eos_ids=info.eos_ids))
        front.engine.submit(Request(id="b", prompt=(10**6,), eos_ids=info.eos_ids))
        front.engine.submit(Request(id="c", prompt=prompt, params=SamplingParams(max_tokens=8000), eos_ids=()))
        front.engine.embed("e", (5, 6))
        front.engine.embed("f", ())
        await front.until(lambda: front.ended("a") and len(front.tokens("c")) > 3)
        front.engine.cancel("c")
        refused = {m.id: m.field for m in front.messages if isinstance(m, Refused)}
        assert refused == {"b": "prompt", "f": "prompt"}
        assert [m.id for m in front.messages if isinstance(m, Embedded)] == ["e"]
        await front.until(lambda: front.messages[-1].load.free_pages == info.limits.num_pages)
        assert len(front.tokens("a")) == 5
        await front.engine.stop()
        assert front.deaths == []

    asyncio.run(main())


def test_a_process_that_is_killed_is_noticed():
    async def main():
        front = Front()
        await front.engine.start()
        os.kill(front.engine.pid, signal.SIGKILL)
        await front.until(lambda: front.deaths)
        assert "-9" in front.deaths[0]
        await front.engine.stop()

    asyncio.run(main())


def test_a_process_that_stands_still_is_ended():
    async def main():
        front = Front(stuck_seconds=0.5)
        info = await front.engine.start()
        os.kill(front.engine.pid, signal.SIGSTOP)
        front.engine.submit(Request(id="a", prompt=(5,), eos_ids=info.eos_ids))
        await front.until(lambda: front.deaths)
        assert "did nothing" in front.deaths[0]
        await front.engine.stop()

    asyncio.run(main())


def test_a_model_that_is_not_there_is_said_so():
    async def main():
        front = Front(model="./no-such-folder")
        with pytest.raises(CheckpointError, match="no-such-folder"):
            await front.engine.start()

    asyncio.run(main())


def code_that_travels(text):
    """Uses of what turns data into code: modules that unpickle, eval and exec, torch.load."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.partition(".")[0] in {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in {"eval", "exec", "torch.load", "__import__"} else []
        found += ["trust_remote_code"] if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" else []
    return found


def test_no_code_travels_between_processes(pytestconfig):
    files = sorted(Path(pytestconfig.rootpath / "ernie45").rglob("*.py"))
    assert len(files) > 50
    assert {file.name: uses for file in files if (uses := code_that_travels(file.read_text("utf-8")))} == {}
    assert set(code_that_travels("import pickle\neval(x)\nf(trust_remote_code=True)")) == {"pickle", "eval", "trust_remote_code"}


def test_a_model_plans_its_memory_before_it_is_read_and_is_refused_with_the_numbers(tmp_path):
    decoder = save_tiny(tmp_path, DENSE)

    async def run():
        front = Front(model=str(tmp_path), memory=1000)
        with pytest.raises(CheckpointError, match=r"does not fit: weights .* are available"):
            await front.engine.start()
        front = Front(model=str(tmp_path), max_length=64)
        info = await front.engine.start()
        assert front.plan.weights == sum(tensor.nbytes for tensor in decoder.state_dict().values())
        assert "weights" in info.settings["memory"]
        await front.engine.stop()

    asyncio.run(run())


def test_a_process_computes_on_the_cores_it_may_use_and_says_so(tmp_path):
    """Whatever its parent keeps to by then: an engine that starts later gets the cores that the server was started with."""
    decoder = save_tiny(tmp_path, DENSE)
    last = max(os.sched_getaffinity(0))

    async def run():
        front = Front(model=str(tmp_path), max_length=64, threads=1, pin="on", cpus=(last,))
        info = await front.engine.start()
        assert (info.threads, info.cpus) == (1, (last,))
        assert os.sched_getaffinity(front.engine.pid) == {last}
        assert info.settings["threads"] == f"1 (as asked), pinned to core {last}; one memory node"
        assert info.memory["weights"] == sum(tensor.nbytes for tensor in decoder.state_dict().values())
        assert info.memory["cache"] == info.limits.num_pages * 32 * 2 * 2 * 2 * 12 * 4
        assert info.active_parameters <= info.parameters
        await front.engine.stop()
        front = Front(model=str(tmp_path), threads="many")
        with pytest.raises(CheckpointError, match=r"engine\.threads"):
            await front.engine.start()

    asyncio.run(run())


def test_a_process_serves_adapters_from_its_folder(tmp_path):
    (tmp_path / "model").mkdir()
    decoder = save_tiny(tmp_path / "model", DENSE)
    factors = random_factors(decoder.config, 1)
    write(tmp_path / "adapters" / "voice", factors)
    prompt = [4, 5, 6, 7]

    async def run():
        front = Front(model=str(tmp_path / "model"), max_length=64, adapters=str(tmp_path / "adapters"), dtype="float32")
        await front.engine.start()
        for id, adapter in (("1", ""), ("2", "voice"), ("3", "nobody")):
            params = SamplingParams(temperature=0, max_tokens=5)
            front.engine.submit(Request(id=id, prompt=tuple(prompt), params=params, adapter=adapter))
        await front.until(lambda: any(isinstance(m, Refused) for m in front.messages) and len(front.tokens("1") + front.tokens("2")) == 10)
        await front.engine.stop()
        return front

    front = asyncio.run(run())
    whole = merged(build(decoder.config), factors, 2.0)
    for id, network in (("1", decoder), ("2", whole)):
        logits = network.prompt_logits([*prompt, *front.tokens(id)])
        assert front.tokens(id) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    [refused] = [message for message in front.messages if isinstance(message, Refused)]
    assert "no adapter 'nobody'" in refused.text
