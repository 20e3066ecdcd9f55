"""The learning rate at every step, by the published formulas."""

import math

import pytest

from ernie45.errors import ConfigError
from ernie45.train.schedule import ScheduleConfig


def test_constant_stays():
    schedule = ScheduleConfig(peak=3.0, shape="constant", end=1.0)
    assert {schedule.at(step, 50) for step in range(50)} == {3.0}


def test_warmup_rises_evenly_and_reaches_the_peak():
    schedule = ScheduleConfig(peak=1.0, warmup=4, shape="constant")
    assert [schedule.at(step, 10) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_linear_and_cosine_halve_in_the_middle(shape, middle):
    schedule = ScheduleConfig(peak=1.0, end=0.0, shape=shape)
    assert schedule.at(0, 100) == 1.0
    assert schedule.at(50, 100) == pytest.approx(middle)
    assert schedule.at(100, 100) == pytest.approx(0.0)


@pytest.mark.parametrize("decay", ["1-sqrt", "half-life"])
def test_wsd_is_steady_then_decays_by_its_formula(decay):
    schedule = ScheduleConfig(peak=1.0, end=0.1, warmup=10, shape="wsd", steady=0.5, decay=decay)
    assert {schedule.at(step, 100) for step in range(10, 51)} == {1.0}
    q = 0.36
    share = 1 - math.sqrt(q) if decay == "1-sqrt" else (0.05**q - 0.05) / 0.95
    assert schedule.at(68, 100) == pytest.approx(0.1 + 0.9 * share)
    assert schedule.at(100, 100) == pytest.approx(0.1)
    rates = [schedule.at(step, 100) for step in range(50, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"peak": float("nan")}, {"end": 1.0}, {"warmup": -1}, {"steady": 1.5}])
def test_what_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"schedule\.{next(iter(wrong))}"):
        ScheduleConfig(**wrong)
