"""A real server: the model's thread has its core, the front keeps to the others, and both say so."""

import os

from tests.engine.test_engine import DENSE
from tests.engine.tiny_folder import save_tiny
from tests.serving import serving


def test_the_front_leaves_pinned_cores_to_the_model(tmp_path):
    save_tiny(tmp_path, DENSE)
    cpus = sorted(os.sched_getaffinity(0))
    arguments = ["--storage", "off", "--engine.threads", "1", "--engine.pin", "on", "--engine.max-length", "64"]
    with serving(str(tmp_path), *arguments) as server:
        said = [line.split(maxsplit=1) for line in server.told.splitlines()]
        told = {words[0]: words[1].strip() for words in said if len(words) == 2}
        assert told["threads"] == f"1 (as asked), pinned to core {cpus[0]}; one memory node"
        assert "weights" in told["memory"]
        assert "tokens), together at most" in told["memory"]
        others = {cpu for cpu in cpus if cpu != cpus[0]}  # with a single one there is nothing to keep off
        assert os.sched_getaffinity(server.process.pid) == (others or set(cpus))
