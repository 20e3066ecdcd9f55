"""Batches made ahead are those of the sequence, each step's while the one before learns, and no more than are asked for."""

import threading

import pytest

from ernie45.errors import DataError
from ernie45.train.ahead import Ahead


class Numbers:
    """Batches that are their own numbers; remembers which were made, and by whom."""

    def __init__(self, broken=-1):
        self.made, self.threads, self.broken = [], set(), broken
        self.reached = threading.Condition()

    def batch(self, index):
        with self.reached:
            self.made.append(index)
            self.threads.add(threading.current_thread())
            self.reached.notify_all()
        if index == self.broken:
            raise DataError("row 7: its picture is gone")
        return index

    def wait_for(self, index):
        with self.reached:
            assert self.reached.wait_for(lambda: index in self.made, timeout=10)


@pytest.fixture
def opened():
    held = []

    def make(*arguments):
        held.append(Ahead(*arguments))
        return held[-1]

    yield make
    for ahead in held:
        ahead.close()


def test_the_next_step_is_made_while_one_learns_and_none_behind_the_last(opened):
    data = Numbers()
    ahead = opened(data, range(1, 4, 2), 4, 12)  # the second of two ranks, three steps of four batches
    assert ahead.take(0) == [1, 3]
    data.wait_for(7)  # nobody has asked for it yet
    assert ahead.take(4) == [5, 7]
    assert ahead.take(8) == [9, 11]
    ahead.close()
    assert data.made == [1, 3, 5, 7, 9, 11]
    assert len(data.threads) == 1
    assert threading.current_thread() not in data.threads


def test_a_run_that_goes_on_begins_where_it_stood(opened):
    data = Numbers()
    ahead = opened(data, range(2), 2, 100)
    assert ahead.take(40) == [40, 41]
    assert ahead.take(10) == [10, 11]  # another place than was made ahead


def test_what_cannot_be_made_is_raised_by_its_own_step(opened):
    data = Numbers(broken=3)
    ahead = opened(data, range(2), 2, 8)
    assert ahead.take(0) == [0, 1]
    data.wait_for(3)
    with pytest.raises(DataError, match="row 7"):
        ahead.take(2)
