"""`python -m story`: run the course, then write the page."""

import argparse
import os
import sys
import time
from pathlib import Path

from ernie45.config import shorten_thread_waits
from ernie45.errors import ConfigError, ErnieError
from story.course import Course, Plan
from story.page import write_page

QUICK_SCALE = 0.12
_MOST = 10


def arguments(words: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m story", description="Train a small model that sees, from nothing to a served chat.")
    parser.add_argument("--out", type=Path, default=None, help="the story's folder (default build/story, with --quick build/story-quick)")
    parser.add_argument("--packages", type=Path, default=Path("build/packages"), help="where fetched packages lie (default %(default)s)")
    parser.add_argument("--scale", type=float, default=None, help="share of the whole story's pictures and steps (default 1)")
    parser.add_argument("--quick", action="store_true", help="minutes instead of half an hour: forms alone, a smaller model, no packages")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw (default %(default)s)")
    parser.add_argument("--publish", type=Path, default=None, help="repository that the page and the checkpoint `sighted` are written into")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Run what is asked for; 0 done, 2 a mistake or something missing."""
    asked = arguments(words)
    shorten_thread_waits()
    start = time.perf_counter()
    scale = asked.scale if asked.scale is not None else QUICK_SCALE if asked.quick else 1.0
    out = asked.out or Path("build/story-quick" if asked.quick else "build/story")

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:7.0f} s  {line}", flush=True)

    try:
        if not 0 < scale <= _MOST:
            raise ConfigError(f"--scale is {scale}; it is a share above 0, such as 0.05, and at most {_MOST}")
        Course(Plan(out, asked.packages, scale, asked.quick, asked.workers), say).run()
        say(f"told in {write_page(out.resolve(), root=asked.publish)}")
    except ErnieError as error:
        print(f"story: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
