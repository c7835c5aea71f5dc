"""Bands that are under way at once come out in order, and no more of them than there is room for."""

from __future__ import annotations

import threading
import time

import pytest

from tsenor_cli.overlap import ahead


@pytest.mark.parametrize("count", [1, 3])
def test_results_keep_their_order_and_work_runs_ahead(count):
    started, used, most = [], [], 0
    lock = threading.Lock()

    def work(number):
        with lock:
            started.append(number)
        time.sleep(0.002 * (5 - number % 5))  # later ones are often done earlier
        return number

    for result in ahead(work, [(number,) for number in range(20)], count, threads=count):
        used.append(result)
        most = max(most, len(started) - len(used))
    assert used == list(range(20))
    assert most <= count


def test_what_goes_wrong_comes_out_and_ends_it():
    started = []

    def work(number):
        started.append(number)
        time.sleep(0.01)
        if number == 3:
            raise ValueError("three")
        return number

    used = []
    with pytest.raises(ValueError, match="three"):
        used.extend(ahead(work, [(number,) for number in range(50)], 2))
    assert used == [0, 1, 2]
    assert len(started) <= 7


def test_nothing_to_do():
    assert list(ahead(str, [], 3)) == []
