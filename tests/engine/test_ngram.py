"""The index against a search through the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.ngram import _LONGEST, _PLACES, SuffixIndex

tokens = st.lists(st.integers(0, 3), max_size=60)


def searched(hint, text, count):
    """The newest of the places that agree longest with the end, among the newest few where the last two tokens stood; hint and text are
    read as one but for pairs across their seam."""
    whole = [*hint, *text]
    end = len(whole) - 1
    pairs = [p for p in range(1, end) if p != len(hint) and whole[p - 1 : p + 1] == whole[end - 1 :]]
    if len(whole) < 2 or end == len(hint):
        return ()
    best = max(
        reversed(pairs[-_PLACES:]),
        key=lambda p: next((n for n in range(min(_LONGEST, p + 1)) if whole[p - n] != whole[end - n]), min(_LONGEST, p + 1)),
        default=None,
    )
    if best is None:
        return ()
    agreement = next((n for n in range(min(_LONGEST, best + 1)) if whole[best - n] != whole[end - n]), min(_LONGEST, best + 1))
    count = min(count, 2 * (agreement - 1))
    for _ in range(count):
        best += 1
        whole.append(whole[best])
    return tuple(whole[-count:])


@given(tokens, tokens, st.lists(tokens, max_size=4), st.integers(1, 9))
def test_drafts_follow_the_longest_agreement(hint, text, further, count):
    index = SuffixIndex(hint, text)
    for more in further:
        index.extend(more)
        text = [*text, *more]
    assert len(index) == len(text)
    assert index.draft(count) == searched(hint, text, count)


def test_a_copy_goes_on_where_it_was():
    index = SuffixIndex((), (5, 6, 7, 8, 9, 1, 5, 6))
    assert index.draft(4) == (7, 8)
    index.extend((7, 8))
    assert index.draft(4) == (9, 1, 5, 6)


def test_a_repetition_goes_on_with_itself():
    assert SuffixIndex((), (4, 1, 2, 3, 4, 1, 2, 3, 4)).draft(7) == (1, 2, 3, 4, 1, 2, 3)


def test_a_hint_is_copied_from():
    assert SuffixIndex((1, 2, 3, 4), (9, 1, 2)).draft(2) == (3, 4)
    assert SuffixIndex((), (9, 1, 2)).draft(2) == ()


def test_a_long_monotonous_text_is_quick():
    index = SuffixIndex((), [7] * 100_000)
    assert index.draft(8) == (7,) * 8
