"""Reads the JSON of one tool call a character at a time, so that its arguments can be passed on while they are being written.

    {"name": "weather", "arguments": {"city": "Paris"}}

Only structure is followed here: strings, brackets, the keys of the outer object. Whether the arguments are a JSON object is asked of the
`json` module once they are complete. What cannot be JSON (a `<` or a raw newline where none may stand) makes the call broken at
that character; a closing tag inside a string is part of the string.
"""

import json
from typing import Literal

from ernie45.tokens.messages import is_json_object

_SPACE = " \t\r\n"


class CallScanner:
    """The state of one call.

    name       the tool's name once its string is complete
    ended      the outer object is complete;  broken: this cannot be JSON any more;  either way `feed` takes nothing further
    raw        everything fed, for giving it back verbatim when no name was found
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.ended = False
        self.broken = False
        self.raw = ""
        self._arguments = ""
        self._pending = ""
        self._place: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._key = ""
        self._literal: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def over(self) -> bool:
        """Whether only the closing tag is awaited."""
        return self.ended or self.broken

    def feed(self, text: str) -> str:
        """Reads on until the call is over; returns the text not read."""
        for at, char in enumerate(text):
            self._step(char)
            if self.over:
                used = at if self.broken else at + 1
                self.raw += text[:used]
                return text[used:]
        self.raw += text
        return ""

    def feed_after(self, text: str) -> None:
        """Text between the end of what could be read and the closing tag: part of broken arguments, ignored after a whole object."""
        self.raw += text
        if self.broken:
            self._pending += text

    def take_arguments(self) -> str:
        """The text of the arguments not taken yet; nothing before the name is known."""
        if self.name is None:
            return ""
        taken, self._pending = self._pending, ""
        self._arguments += taken
        return taken

    def close(self) -> None:
        """No more comes. A whole call that has no arguments gets an empty object."""
        if self.ended and not self._arguments and not self._pending:
            self._pending = "{}"

    def valid(self) -> bool:
        """Whether the arguments taken are a JSON object."""
        return is_json_object(self._arguments)

    def _step(self, char: str) -> None:
        if self._place == "value":
            self._value(char)
        elif self._in_string:  # a key of the outer object
            self._literal.append(char)
            self._string(char)
            if not self._in_string and not self.broken:
                self._key = self._decoded() or ""
                self._place = "colon"
        elif char in _SPACE:
            pass
        elif (self._place, char) == ("open", "{") or (self._place, char) == ("comma", ","):
            self._place = "key"
        elif self._place == "key" and char == '"':
            self._literal = [char]
            self._in_string = True
        elif (self._place, char) == ("colon", ":"):
            self._place, self._literal = "value", []
        elif self._place in ("key", "comma") and char == "}":
            self.ended = True
        else:
            self.broken = True

    def _value(self, char: str) -> None:
        if not self._literal and char in _SPACE:
            return
        if self._in_string:
            self._string(char)
        elif char == "<" or (not self._literal and char in ",}]"):
            self.broken = True
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif self._depth and char in "}]":
            self._depth -= 1
        elif not self._depth and char in ",}" + _SPACE:  # the end of a number, true, false or null
            self._end_value()
            if not self.broken:
                self._step(char)
            return
        if self.broken:
            return
        self._literal.append(char)
        if self._key == "arguments" and self._literal[0] == "{":
            self._pending += char
        if not self._depth and not self._in_string and char in '}]"':
            self._end_value()

    def _end_value(self) -> None:
        first = self._literal[0]
        if self._key == "name":
            self.name = self.name or self._decoded() or None
            self.broken = self.name is None
        elif self._key == "arguments" and first != "{":
            # Some models write the object as a string, or null for none; anything else goes on as it is, and is not valid.
            raw = "".join(self._literal)
            text = self._decoded() if first == '"' else None
            self._pending += text if text is not None else "" if raw == "null" else raw
        self._place, self._literal = "comma", []

    def _string(self, char: str) -> None:
        if char < " ":
            self.broken = True
        elif self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False

    def _decoded(self) -> str | None:
        """The text of the string literal just read; None when it is not one, or not text that can be passed on."""
        try:
            value = json.loads("".join(self._literal))
            value.encode()
        except (ValueError, AttributeError):
            return None
        return value
