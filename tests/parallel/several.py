"""Starts a function on several ranks, as a launcher would: `python -m tests.parallel.several MODULE FUNCTION FOLDER`.

Every rank calls `FUNCTION(ranks, folder)` and leaves what it returns in `FOLDER/rank-N.pt`.
"""

import importlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(function, world, folder, *, only=None):
    """The processes of `world` ranks, each at work on `function`. `only` overrides the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.parallel.several", function.__module__, function.__name__, str(folder)]
    return [
        subprocess.Popen(
            words, cwd=ROOT, env=common | {"RANK": str(rank)} | (only or {}), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]


def wait(processes, timeout=120.0):
    """Exit codes and error streams, in order of ranks; none outlives `timeout` seconds."""
    until = time.monotonic() + timeout
    done = []
    try:
        for process in processes:
            _, said = process.communicate(timeout=max(0.1, until - time.monotonic()))
            done.append((process.returncode, said))
    finally:
        for process in processes:
            process.kill()
    return done


def results(function, world, folder):
    """What every rank of `world` returned."""
    import torch

    for code, said in wait(start(function, world, folder)):
        assert code == 0, said
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def main():
    """One rank."""
    import torch

    from ernie45.config import Environment
    from ernie45.errors import ErnieError
    from ernie45.parallel.ranks import open_ranks

    torch.set_num_threads(1)
    module, name, folder = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    environment = Environment.read()
    try:
        with open_ranks(replace(environment), timeout=20.0) as ranks:
            torch.save(function(ranks, Path(folder)), Path(folder) / f"rank-{ranks.rank}.pt")
    except ErnieError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
