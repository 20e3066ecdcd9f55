"""The screen side of the commands: what may be printed, lines that are redrawn in place, a progress bar.

A model's text, a file name or a saved conversation is never trusted with the terminal: `clean` takes the control characters out first.
"""

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from ernie45.config import Environment

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: a long step says how far it is; a total of 0 means that the end is not known."""

_REPLACED: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},  # Escape is shown as the picture of Escape
    0x0D: None,
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),  # C1: some terminals read 0x9B as Escape [
    0x2028: "\n",
    0x2029: "\n",
    # marks that turn the reading direction of what follows, so that text can pose as other text
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


def clean(text: str) -> str:
    """`text` without any character that could command a terminal; line ends and tabs stay, the rest is replaced visibly."""
    return text.translate(_REPLACED)


def size_text(number: float, unit: str = "B") -> str:
    """Bytes as people say them, in powers of 1000: 360.7 MB. Below 1000 the number is exact."""
    if number < 1000:
        return f"{number:.0f} {unit}"
    power = min(int(math.log(number, 1000)), 5)
    if round(number / 1000**power, 1) >= 1000 and power < 5:
        power += 1
    return f"{number / 1000**power:.1f} {'_kMGTP'[power]}{unit}"


@dataclass(frozen=True)
class Style:
    """How text is made to stand out: sequences for a terminal that takes them, nothing otherwise. Weight before colour."""

    ansi: bool
    color: bool

    @classmethod
    def of(cls, stream: IO[str], environment: Environment) -> "Style":
        """What `stream` takes: nothing when it is no terminal; no colour when NO_COLOR is set."""
        ansi = stream.isatty()
        return cls(ansi=ansi, color=ansi and not environment.no_color)

    def bold(self, text: str) -> str:
        """Bold text."""
        return f"\x1b[1m{text}\x1b[0m" if self.ansi else text

    def dim(self, text: str) -> str:
        """Faint text: what may be skipped."""
        return f"\x1b[2m{text}\x1b[0m" if self.ansi else text

    def accent(self, text: str) -> str:
        """The one colour of the house; bold where colours are off."""
        return f"\x1b[36m{text}\x1b[0m" if self.color else self.bold(text)

    def warning(self, text: str) -> str:
        """Something that needs an answer."""
        return f"\x1b[33m{text}\x1b[0m" if self.color else self.bold(text)


class LiveLines:
    """Lines at the bottom of the screen that are redrawn in place, without flicker.

    Only the lines from the first difference on are written again, in one write inside a synchronised update. What has scrolled off the
    top can no longer be reached and stays as it was.
    """

    def __init__(self, stream: IO[str], size: Callable[[], tuple[int, int]] | None = None) -> None:
        self._stream = stream
        self._size = size or (lambda: tuple(shutil.get_terminal_size()))
        self._shown: list[str] = []
        self._width = self._size()[0]

    def show(self, lines: Sequence[str]) -> None:
        """Make the lines on the screen equal to `lines` (each at most as wide as the terminal, styles closed at its end)."""
        width, height = self._size()
        kept = 0 if width != self._width else _common(self._shown, lines)
        self._width = width
        rows = 0
        first = len(self._shown)
        while first > kept:  # how far up is still on the screen
            taken = max(1, math.ceil(visible_width(self._shown[first - 1]) / max(width, 1)))
            if rows + taken > height - 1:
                break
            rows, first = rows + taken, first - 1
        if not rows and len(lines) <= first:
            return
        up = f"\x1b[{rows}A" if rows else ""
        body = "".join(line + "\n" for line in lines[first:])
        self._stream.write(f"\x1b[?2026h{up}\r\x1b[J{body}\x1b[?2026l")
        self._stream.flush()
        self._shown = [*self._shown[:first], *lines[first:]]

    def leave(self) -> None:
        """Let the lines be: what is shown next starts below them."""
        self._shown = []


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def visible_width(line: str) -> int:
    """Cells that a line with style sequences takes."""
    from rich.cells import cell_len
    from rich.control import strip_control_codes
    from rich.text import Text

    return cell_len(strip_control_codes(Text.from_ansi(line).plain))


@contextmanager
def hidden_cursor(stream: IO[str]) -> Iterator[None]:
    """Hide the cursor while lines are redrawn; shown again whatever happens."""
    stream.write("\x1b[?25l")
    try:
        yield
    finally:
        stream.write("\x1b[?25h")
        stream.flush()


@contextmanager
def progress_bar(
    environment: Environment, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """A `Progress` drawn as one line on stderr and wiped at the end; silent when stderr is no terminal.

    Drawn at most twenty times a second, and at once when a stage begins.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield lambda stage, done, total: None
        return
    style, live, last, before = Style.of(stream, environment), LiveLines(stream), float("-inf"), ""

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last, before
        now = clock()
        if now - last < 0.05 and stage == before:
            return
        last, before = now, stage
        live.show([bar_line(style, stage, done, total, shutil.get_terminal_size().columns)])

    with quiet_keyboard():  # keys pressed while waiting would push the line about
        try:
            yield progress
        finally:
            live.show([])


def bar_line(style: Style, stage: str, done: int, total: int, columns: int) -> str:
    """One line of a progress bar, no wider than `columns`."""
    amount = f"{size_text(done, '')} of {size_text(total, '')}" if total >= 100_000 else f"{done} of {total}"
    if total <= 0:
        return f"{clean(stage)[: columns - 3]} …"
    part = min(max(done / total, 0.0), 1.0)
    room = min(30, columns - len(stage) - len(amount) - 12)
    if room < 6:
        return style.dim(f"{clean(stage)} {part:.0%}"[: columns - 1])
    full = int(part * room)
    return f"{clean(stage)}  {style.accent('━' * full)}{style.dim('━' * (room - full))}  {part:4.0%}  {style.dim(amount)}"


@contextmanager
def quiet_keyboard(stream: IO[str] | None = None) -> Iterator[None]:
    """While lines are redrawn, keys must not write themselves onto the screen; what is typed waits for the next prompt."""
    stream = sys.stdin if stream is None else stream
    try:
        import termios
    except ImportError:  # no terminal of this kind: nothing to keep quiet
        yield
        return
    try:
        descriptor = stream.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal here
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Interrupt:
    """Ctrl-C as a question that is asked between two steps: the first press sets `asked`, the second raises `KeyboardInterrupt`."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def terminal_columns() -> int:
    """Columns of the terminal, 80 where nobody knows."""
    return shutil.get_terminal_size().columns
