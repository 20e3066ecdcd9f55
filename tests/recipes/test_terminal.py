"""What may be printed, and lines that are redrawn in place."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.config import Environment
from ernie45.recipes.terminal import LiveLines, Style, bar_line, clean, progress_bar, size_text, visible_width


@given(st.text(st.characters(codec=None)))
def test_clean_text_cannot_command_a_terminal(text):
    left = {c for c in clean(text) if unicodedata.category(c) in ("Cc", "Cs") or 0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069}
    assert left <= {"\n", "\t"}


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp"))))
def test_clean_leaves_ordinary_text_alone(text):
    assert clean(text) == text


def test_clean_keeps_joined_emoji_and_shows_what_it_took():
    family = "👨\u200d👩\u200d👧"
    assert clean(family) == family
    assert clean("a\x1b[31mred\x9b2J\r\n") == "a␛[31mred\ufffd2J\n"


# Lines narrower than the screen: what is wider is never handed over.
frames = st.lists(st.lists(st.text("ab ", max_size=9).map(str.rstrip), max_size=7), max_size=8)


@given(frames)
def test_the_last_frame_is_what_stands_on_the_screen(Screen, shown):
    screen = Screen(10, 8)
    live = LiveLines(screen, lambda: (10, 8))
    for lines in shown:
        live.show(lines)
        assert screen.text == [*lines, ""]


@given(st.lists(st.text("ab ", min_size=1, max_size=9).map(lambda t: t.rstrip() or "a"), max_size=30), st.integers(3, 8))
def test_growing_text_leaves_a_whole_scrollback(Screen, lines, rows):
    screen = Screen(10, rows)
    live = LiveLines(screen, lambda: (10, rows))
    for count in range(len(lines) + 1):
        live.show(lines[:count])
    assert screen.text[:-1] == lines


def test_only_what_changed_is_written_again(Screen):
    screen = Screen(20, 10)
    written = []
    screen.write = lambda data: written.append(data) or len(data)
    live = LiveLines(screen, lambda: (20, 10))
    live.show(["one", "two", "three"])
    live.show(["one", "two", "three", "four"])
    assert "one" not in written[-1]
    assert "four" in written[-1]


def test_a_narrower_window_is_drawn_over_completely(Screen):
    screen = Screen(20, 10)
    size = [20, 10]
    live = LiveLines(screen, lambda: tuple(size))
    live.show(["a" * 18, "b"])
    # the terminal reflows what stands there, then the program draws for the new width
    narrow = Screen(10, 10)
    narrow.write("".join(line + "\n" for line in ("a" * 18, "b")))
    live._stream = narrow
    size[0] = 10
    live.show(["c", "d"])
    assert narrow.text == ["c", "d", ""]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_999, "1.0 MB"), (599e9, "599.0 GB"), (1e18, "1000.0 PB")],
)
def test_sizes_read_well_at_their_edges(number, text):
    assert size_text(number) == text


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize(("done", "total"), [(0, 10), (5, 10), (10, 10), (12, 10), (3, 0), (1_000_000, 540_000_000)])
def test_a_progress_line_fits_its_terminal(columns, done, total):
    for style in (Style(True, True), Style(False, False)):
        assert visible_width(bar_line(style, "writing the starter model", done, total, columns)) < columns


def test_progress_is_silent_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    with progress_bar(Environment(cache_dir=tmp_path), stream) as progress:
        progress("loading", 1, 2)
    assert stream.getvalue() == ""


def test_progress_is_wiped_when_it_ends(Screen, tmp_path):
    screen, seconds = Screen(60, 5), iter([0.0, 1.0, 2.0, 3.0])
    with progress_bar(Environment(cache_dir=tmp_path), screen, lambda: next(seconds)) as progress:
        progress("loading", 1, 4)
        assert "loading" in screen.text[0]
        assert "25%" in screen.text[0]
    assert screen.text == [""]


def test_styles_are_plain_without_a_terminal_and_colourless_when_asked():
    assert Style(False, False).accent("x") == "x"
    assert "\x1b[36m" in Style(True, True).accent("x")
    assert "3" not in Style(True, False).warning("x")
