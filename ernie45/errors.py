"""The one kind of failure that belongs to the caller.

Two kinds of failure exist here. A mistake of the caller raises an `ErnieError`, whose text says what came, what is allowed and what
to do next. A mistake of ours is an `assert`. Nothing else is raised on purpose, and nothing is logged in place of an answer.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ErnieError(Exception):
    """A mistake the caller can mend; the text says how. Commands print it without a traceback and exit with 2."""


class ConfigError(ErnieError):
    """A setting, a `config.json` or a command-line value that cannot be honoured."""


class CheckpointError(ErnieError):
    """A model folder or weight file that is missing, damaged, hostile, or of another family."""


class TokenizerError(ErnieError):
    """Text, ids or messages that cannot be turned into a prompt."""


class DataError(ErnieError):
    """A training row or data file that cannot be learned from; the text names file, line and field."""


class RunError(ErnieError):
    """A training run that cannot go on: its folder is in use, its checkpoint is of another run, its losses are not finite."""


class RequestError(ErnieError):
    """A generation request that cannot be honoured. `field` names the offending setting where there is one."""

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class MissingExtra(ErnieError):
    """An optional part that is not installed; the text names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package '{package}', which is not installed; run: pip install 'ernie45[{extra}]'")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of an error text: the nearest allowed word, or all of them when they are few; empty when neither helps."""
    names = sorted(allowed)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; allowed: {', '.join(names)}" if 0 < len(names) <= 12 else ""
