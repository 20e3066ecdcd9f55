"""`ernie serve` as a process of its own, for tests of whole servers."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass
class Serving:
    """A server that answers: its process, its address without a path, and what it said on the way."""

    process: subprocess.Popen
    url: str
    told: str


def start(*arguments: str, env: dict[str, str] | None = None, **options) -> Serving:
    """Starts one on a free port and waits until it is ready. env: beside this process's own. Whoever starts it ends it."""
    command = [sys.executable, "-m", "ernie45", "serve", *arguments, "--port", "0", "--log", "off"]  # nobody reads its standard error
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}), **options)
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("ready:"):
            return Serving(process, re.search(r"https?://\S+:\d+", line).group(), told)
    pytest.fail(told)


@contextmanager
def serving(*arguments: str, env: dict[str, str] | None = None):
    """As `start`; it is ended behind the block."""
    made = start(*arguments, env=env)
    with made.process:
        try:
            yield made
        finally:
            made.process.terminate()
            made.process.stderr.read()
