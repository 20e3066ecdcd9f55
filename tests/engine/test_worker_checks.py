"""The engine's loop: when it has nothing to do it proves that all pages are free, and a proof that fails ends the process."""

import socket

import pytest

from ernie45.engine.fake import FakeEngine
from ernie45.engine.request import Request, SamplingParams
from ernie45.engine.scheduler import SchedulerConfig
from ernie45.engine.wire import Submit, ToEngine, pack
from ernie45.engine.worker import Channel, Gone, Worker

LIMITS = SchedulerConfig(token_budget=64, max_running=4, page_size=8, num_pages=16, max_length=64)


class Watched(FakeEngine):
    """Counts the proofs; with `leaks`, a page of each request is lost. The front leaves after the first proof behind a step."""

    def __init__(self, leaks=False):
        super().__init__(LIMITS, new_seed=lambda: 1)
        self.proofs, self.steps, self.leaks = 0, 0, leaks
        self.leave = lambda: None

    def step(self):
        outputs = super().step()
        self.steps += 1
        if self.leaks and self.idle:
            self._scheduler.pool.allocate()
        return outputs

    def verify(self):
        self.proofs += 1
        super().verify()
        if self.steps:
            self.leave()


def run(engine, requests):
    """The loop over requests that were sent before it began."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for n in range(requests):
            ours.sendall(pack(Submit(Request(id=str(n), prompt=(5, 6, 7), params=SamplingParams(max_tokens=4)))))
        engine.leave = lambda: ours.shutdown(socket.SHUT_RDWR)
        Worker(engine, Channel(theirs, ToEngine)).run()


def test_pages_are_proved_free_when_the_engine_is_idle():
    engine = Watched()
    with pytest.raises(Gone):
        run(engine, 3)
    assert engine.proofs >= 1
    assert engine.load.free_pages == LIMITS.num_pages


def test_a_page_that_is_lost_ends_the_engine_rather_than_be_missed():
    with pytest.raises(AssertionError):
        run(Watched(leaks=True), 1)
