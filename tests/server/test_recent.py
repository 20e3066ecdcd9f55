"""The last minutes in numbers: percentiles beside NumPy's, points of throughput beside a plain count, nothing kept for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.server.recent import EVERY, WINDOW, Pace, Recent, Times


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=300))
def test_percentiles_are_numpys_to_two_percent(seconds):
    times = Times()
    for value in seconds:
        times.add(value, 100.0)
    found = times.percentiles(101.0)
    assert found.pop("count") == len(seconds)
    for name, value in found.items():
        exact = np.percentile(seconds, int(name[1:]), method="inverted_cdf")  # the nearest rank
        assert value == pytest.approx(exact, rel=0.02)
    assert list(found) == ["p50", "p90", "p95", "p99"]


def test_what_is_long_ago_is_forgotten_and_nothing_grows():
    times = Times()
    for now in range(0, 10_000, 3):
        times.add(now / 1000, float(now))
    found = times.percentiles(10_000.0)
    assert found["count"] == pytest.approx(WINDOW / 3, rel=0.05)
    assert found["p50"] == pytest.approx(9.85, rel=0.03)
    assert len(times._slices) <= 30
    assert times.percentiles(10_000.0 + 2 * WINDOW) == {}


def test_nothing_is_said_of_what_did_not_happen():
    recent = Recent()
    assert recent.latency(5.0) == {"window_seconds": WINDOW}
    recent.finished("", {"ttft": 0.5}, 5.0)
    recent.finished("errors", {}, 5.0)
    assert recent.latency(5.0)["ttft"]["p99"] == pytest.approx(0.5, rel=0.02)
    assert "itl" not in recent.latency(5.0)
    assert recent.totals == {"requests": 2, "errors": 1, "cancelled": 0}


@given(st.lists(st.tuples(st.floats(0, 60), st.integers(0, 50)), max_size=50))
def test_points_of_throughput_are_a_plain_count(came):
    pace, came = Pace(), sorted(came)
    for now, tokens in came:
        pace.add(tokens, now)
    points = pace.history(61.0)
    assert len(points) == 90
    for index, value in enumerate(reversed(points), 1):
        end = 60.0 - (index - 1) * EVERY
        assert value * EVERY == sum(tokens for now, tokens in came if end - EVERY <= now < end)
    assert pace.per_second(61.0) == pytest.approx(sum(tokens for now, tokens in came if now >= 52.0) / 9)
    assert len(pace._points) <= 91
