"""Markdown for a terminal, drawn while it is still being written.

The text is split into its top-level blocks. All but the last are finished and are rendered once; only the last is rendered again as it
grows, so that the cost of a frame does not grow with the answer.
"""

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

WIDEST = 100  # prose in longer lines is hard to read

_THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.h4": "bold dim",
        "markdown.item.bullet": "dim",
        "markdown.item.number": "dim",
        "markdown.block_quote": "dim",
        "markdown.hr": "dim",
        "markdown.link": "underline",
        "markdown.link_url": "dim underline",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    },
)


class _Heading(Heading):
    """A heading at the left edge; rich centres them and draws a panel around the first level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    """Code flush left between two faint rules, so that it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip("\n").expandtabs(4)
        name = self.lexer_name if self.lexer_name not in ("", "text", "default") else ""
        yield Rule(Text(name, style="dim"), align="left", style="dim", characters="─")
        text = Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default").highlight(code)
        text.rstrip()
        text.overflow, text.no_wrap = "fold", False
        yield text
        yield Rule(style="dim", characters="─")


class _Markdown(Markdown):
    """The library's Markdown with our heading and code, by the table it offers for that."""

    elements: ClassVar[dict[str, Any]] = {**Markdown.elements, "heading_open": _Heading, "fence": _Code, "code_block": _Code}


class MarkdownLines:
    """Markdown that arrives in pieces, as lines of ANSI text of a given width."""

    def __init__(self, color: bool = True) -> None:
        # HTML is off: rich drops it, and an answer about HTML must show it
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._color = color
        self._open = ""  # source of the last, unfinished block
        self._blocks: list[str] = []  # sources of the finished ones, rendered anew only when the width changes
        self._lines: list[str] = []
        self._width = 0

    def push(self, text: str) -> None:
        """Take the next piece of the source."""
        self._open += text
        if "\n" not in text:
            return
        starts = [token.map[0] for token in self._parser.parse(self._open) if token.level == 0 and token.map and token.nesting >= 0]
        if len(starts) > 1:
            source = self._open.splitlines(keepends=True)
            for begin, end in pairwise(starts):
                self._blocks.append("".join(source[begin:end]))
                if self._width:
                    self._lines += [*([""] if self._lines else []), *self._render(self._blocks[-1])]
            self._open = "".join(source[starts[-1] :])

    def lines(self, columns: int) -> list[str]:
        """All lines, finished and unfinished, for a terminal of `columns`."""
        width = max(min(columns, WIDEST), 10)
        if width != self._width:
            self._width, self._lines = width, []
            for block in self._blocks:
                self._lines += [*([""] if self._lines else []), *self._render(block)]
        last = self._render(_balanced(self._open))
        return self._lines + ([""] if self._lines and last else []) + last

    def _render(self, source: str) -> list[str]:
        markdown = _Markdown("", hyperlinks=False)
        markdown.parsed = self._parser.parse(source)
        for token in markdown.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # models break lines on purpose: verses, addresses
                    child.type = "hardbreak"
        console = Console(
            file=io.StringIO(),
            force_terminal=True,
            width=self._width,
            color_system="standard" if self._color else None,
            no_color=not self._color,
            highlight=False,
            theme=_THEME,
            legacy_windows=False,
            _environ={},  # the width is ours to say, not COLUMNS'
        )
        with console.capture() as captured:
            console.print(markdown)
        lines = [line.rstrip() for line in captured.get().split("\n")]
        while lines and not Text.from_ansi(lines[0]).plain.strip():
            lines.pop(0)
        while lines and not Text.from_ansi(lines[-1]).plain.strip():
            lines.pop()
        return lines


def _balanced(source: str) -> str:
    """The unfinished block with its open emphasis closed for the moment, so that asterisks do not flash by."""
    if source.lstrip().startswith(("```", "~~~")):
        return source
    last = source.rsplit("\n", 1)[-1]
    if last.rstrip().endswith(("**", "`")) and (last.count("**") % 2 or last.count("`") % 2):
        return source.rstrip().rstrip("*`")
    for mark in ("`", "**"):
        if last.count(mark) % 2:
            return source.rstrip() + mark
    return source


def markdown_text(source: str, columns: int, color: bool, render: Callable[[bool], MarkdownLines] = MarkdownLines) -> str:
    """A whole Markdown text as ANSI lines."""
    view = render(color)
    view.push(source)
    return "\n".join(view.lines(columns))
