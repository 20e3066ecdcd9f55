"""Stop strings: any cut of the text gives the same result, and it is the plain one."""

from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.stops import StopFinder


def plain(text, stops, include):
    for end in range(len(text) + 1):
        done = sorted((stop for stop in stops if text[:end].endswith(stop)), key=len)
        if done:
            return text[: end if include else end - len(done[-1])], done[-1]
    return text, None


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_make_no_difference(pieces, stops, include):
    finder = StopFinder(stops, include=include)
    shown, truth = "", plain("".join(pieces), stops, include)
    for piece in pieces:
        shown += finder.push(piece)
        assert truth[0].startswith(shown)
    assert (shown + finder.finish(), finder.found) == truth


def test_only_what_may_begin_a_stop_is_held_back():
    finder = StopFinder(["\nUser:"])
    assert finder.push("hello") == "hello"
    assert finder.push(" you\nUs") == " you"
    assert finder.push("e") == ""
    assert finder.push(" it") == "\nUse it"
    assert finder.push("\nUser: more") == ""
    assert finder.found == "\nUser:"
    assert finder.push("never shown") == ""
