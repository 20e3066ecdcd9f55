"""The commands of ernie, each in a process of its own that ends with the story."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of prctl(2)
Command = Callable[[Sequence[str], Path, Callable[[str], None]], int]
"""Runs a command of ernie, given by its words, in a folder; hears each line of what it says; returns its exit code."""


def run_ernie(words: Sequence[str], folder: Path, hear: Callable[[str], None]) -> int:
    """A `Command`. Interrupted, it ends the command too, which goes on from its checkpoint next time."""
    command = [sys.executable, "-m", "ernie45", *words]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=end_with_parent
    ) as running:
        assert running.stdout is not None
        try:
            for line in running.stdout:
                hear(line)
        except BaseException:
            running.terminate()
            raise
    return running.returncode


def end_with_parent() -> None:
    """In a child: end when the story is ended, even by kill -9, so that the next one finds its folders free. Linux alone can say so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
