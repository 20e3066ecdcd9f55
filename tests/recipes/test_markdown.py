"""Markdown drawn while it is written."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.recipes.markdown import MarkdownLines
from ernie45.recipes.terminal import visible_width

TEXT = """# Title

Some **bold** words, `code` and <b>html</b>
on two lines 🎉 中文

1. one
2. two
   - inner

| a | b |
|---|--:|
| 1 | 2 |

```python
def f():
    return "    spaces"
```

> quoted

Done."""


def plain(lines):
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]


def whole(text, columns=60):
    view = MarkdownLines()
    view.push(text)
    return plain(view.lines(columns))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.sampled_from([24, 60]))
@settings(max_examples=25)
def test_the_end_does_not_depend_on_how_the_text_came(cuts, columns):
    view, rest = MarkdownLines(), TEXT
    for cut in cuts:
        view.push(rest[:cut])
        view.lines(columns)
        rest = rest[cut:]
    view.push(rest)
    assert plain(view.lines(columns)) == whole(TEXT, columns)


@given(st.text("ab*`_#>-|1. \n[](){}<>\\~中", max_size=80), st.integers(5, 60))
@settings(max_examples=60)
def test_any_text_is_drawn_and_fits(text, columns):
    view = MarkdownLines(color=False)
    for character in text:
        view.push(character)
    assert all(visible_width(line) <= max(columns, 10) for line in view.lines(columns))


def test_html_is_shown_and_not_swallowed():
    assert whole("<div>hello</div>") == ["<div>hello</div>"]


def test_line_ends_of_the_author_stay():
    assert whole("Roses are red\nViolets are blue") == ["Roses are red", "Violets are blue"]


def test_code_stands_at_the_left_edge_so_that_it_can_be_copied():
    lines = whole("```python\ndef f():\n    return 1\n```")
    assert lines[1:3] == ["def f():", "    return 1"]
    assert lines[0].startswith("python ─")


@pytest.mark.parametrize(
    ("unfinished", "seen"), [("some **bol", "some bol"), ("some **", "some"), ("run `ls", "run ls"), ("```py\nx = **", "x = **")]
)
def test_open_emphasis_does_not_flash_by(unfinished, seen):
    assert seen in whole(unfinished)


def test_finished_blocks_are_rendered_once(monkeypatch):
    view, rendered = MarkdownLines(), []
    render = view._render
    monkeypatch.setattr(view, "_render", lambda source: rendered.append(source) or render(source))
    for n in range(50):
        view.push(f"paragraph {n}\n\n")
        view.lines(60)
    assert sum("paragraph 0\n" in source for source in rendered) <= 3
    view.lines(40)
    assert sum("paragraph 0\n" in source for source in rendered) <= 4
