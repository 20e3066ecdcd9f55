"""Results of a long command that may be killed at any moment: written as they come, found again, and put in order at the end.

OUT.part   a first line that says what is being made, then a line for each result, in the order in which they were ready
OUT        all results in the order of the input; there once the command is done
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError, RunError


class Results:
    """done: numbers of rows that have a result. Use it in a `with`."""

    def __init__(self, out: Path, making: Mapping[str, Any]) -> None:
        """making: what must be the same for results to belong together.

        Raises `ConfigError` when `out` is there or the part is of something else, `RunError` when it cannot be written or is in use.
        """
        self._out = out
        self._part = out.with_name(out.name + ".part")
        self.done: set[int] = set()
        if out.exists():
            raise ConfigError(f"{out} is there already; name another --output, or remove it")
        try:
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"{self._part} cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up(dict(making))
        except BlockingIOError:
            os.close(self._file)
            raise RunError(f"{self._part} is in use by another run; wait for it, or name another --output") from None
        except BaseException:
            os.close(self._file)
            raise

    def _take_up(self, making: Mapping[str, Any]) -> None:
        """Reads what is there, and cuts off a line that was not finished."""
        data = self._part.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        lines = whole.splitlines()
        if not lines:
            self._write(making)
            return
        try:
            head, self.done = json.loads(lines[0]), {json.loads(line)["line"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._part} holds no results of this command; remove it, or name another --output") from None
        if head != making:
            changed = ", ".join(sorted(name for name in {*head, *making} if head.get(name) != making.get(name)))
            raise ConfigError(f"{self._part} was begun with another {changed}; go on as it was begun, or remove it to begin anew")

    def add(self, result: Mapping[str, Any]) -> None:
        """Keeps a result; its `line` is the row it belongs to. Raises `RunError` when the disk is full."""
        self._write(result)
        self.done.add(result["line"])

    def finish(self) -> None:
        """Puts all results in order under the final name."""
        lines = self._part.read_bytes().splitlines()[1:]
        lines.sort(key=lambda line: json.loads(line)["line"])
        made = self._out.with_name(self._out.name + ".new")
        try:
            with made.open("wb") as file:
                file.writelines(line + b"\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            made.rename(self._out)
            self._part.unlink()
        except OSError as error:
            raise RunError(f"{self._out} cannot be written: {error.strerror or error}; the results are in {self._part}") from None

    def _write(self, value: Mapping[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, start)
            raise RunError(f"{self._part} cannot be written: {error.strerror or error}; run the command again to go on") from None

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
