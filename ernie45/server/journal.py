"""The log: one line of JSON per request and event. Prompts, answers and keys are never in it, and control characters are escaped."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Literal


class Journal:
    """write: where a line goes; standard error when None."""

    def __init__(self, form: Literal["json", "off"], write: Callable[[str], object] | None = None) -> None:
        self._form = form
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))

    def note(self, event: str, **fields: Any) -> None:
        """One line. Fields that are None are left out."""
        if self._form == "json":
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() * 1000) % 1000:03d}Z"
            told = {name: value for name, value in fields.items() if value is not None}
            self._write(json.dumps({"time": stamp, "event": event, **told}, ensure_ascii=True, default=str))
