"""A terminal small enough to trust: it knows the sequences that redrawn lines use, and refuses every other."""

import re

_TOKEN = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """A grid with a cursor and a scrollback; plain text only (styles are dropped), one cell a character."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]
        self.top = 0
        self.row = self.column = 0
        self.hidden = False

    def write(self, data: str) -> int:
        position = 0
        while position < len(data):
            match = _TOKEN.match(data, position)
            assert match, f"not a known sequence: {data[position : position + 12]!r}"
            position = match.end()
            arguments, letter, carriage, newline, text = match.groups()
            if letter:
                self._control(arguments, letter)
            elif carriage:
                self.column = 0
            elif newline:
                self._newline()
            elif text:
                for character in text:
                    self._put(character)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return True

    def _control(self, arguments: str, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - int(arguments or 1), self.top)
        elif letter == "J":
            self.lines = [*self.lines[: self.row], self.lines[self.row][: self.column]]
        elif arguments == "?25":
            self.hidden = letter == "l"
        else:
            assert letter == "m" or arguments == "?2026", f"not a known sequence: {arguments}{letter}"

    def _newline(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")
        self.top = max(self.top, self.row - self.rows + 1)

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self._newline()
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1

    @property
    def text(self) -> list[str]:
        """All lines, what has scrolled away first, without the empty last one."""
        return [line.rstrip() for line in self.lines]
