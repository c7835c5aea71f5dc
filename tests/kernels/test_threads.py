"""Threads that stay, and the scratch they keep."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tsenor_cli.kernels import threads
from tsenor_cli.kernels.threads import limited, over_chunks
from tsenor_cli.masks.solve import solve_mask


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_item_once():
    seen, lock = [], threading.Lock()

    def work(first, last, _):
        with lock:
            seen.extend(range(first, last))

    over_chunks(work, 103, 10, (None, lambda: None))
    assert sorted(seen) == list(range(103))


@pytest.mark.usefixtures("two_threads")
def test_an_exception_arrives():
    def work(first, _last, _scratch):
        if first == 40:
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        over_chunks(work, 100, 10, (None, lambda: None))
    test_every_item_once()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("failing", ["the caller", "its helper"])
def test_after_an_error_nobody_starts_another_chunk(failing):
    both, done = threading.Barrier(2, timeout=60), []

    def work(first, _last, _scratch):
        if first < 2:
            both.wait()  # each has one of the first two
            if (threading.current_thread() is threading.main_thread()) == (failing == "the caller"):
                raise ValueError("here")
        time.sleep(0.01)  # the other fails meanwhile
        done.append(first)

    with pytest.raises(ValueError, match="here"):
        over_chunks(work, 1000, 1, (None, lambda: None))
    assert 1 <= len(done) < 999, "whoever was at work has finished before the error arrives, and has left most"


@pytest.mark.usefixtures("two_threads")
def test_nobody_waits_for_the_work_of_others():
    all_busy, end = threading.Barrier(5, timeout=60), threading.Event()

    def long(*_):
        all_busy.wait()
        end.wait(60)

    callers = [threading.Thread(target=over_chunks, args=(long, 2, 1, (None, lambda: None))) for _ in range(2)]
    short = threading.Thread(target=over_chunks, args=(lambda *_: None, 10, 1, (None, lambda: None)))
    try:
        for caller in callers:
            caller.start()
        all_busy.wait()
        short.start()
        short.join(30)
        assert not short.is_alive()
    finally:
        end.set()
        for thread in (*callers, short):
            thread.join(60)


@pytest.mark.usefixtures("two_threads")
def test_who_is_given_one_thread_works_alone():
    seen = []
    items = (100, 10, (None, lambda: None))
    alone = threading.Thread(
        target=limited(over_chunks, 1), args=(lambda *_: seen.append(threading.get_ident()), *items)
    )
    alone.start()
    alone.join()
    assert seen == [alone.ident] * 10
    limited(over_chunks, 1)(lambda *_: None, *items)
    both = threading.Barrier(2, timeout=60)
    over_chunks(lambda *_: both.wait(), 2, 1, (None, lambda: None))  # no longer than that work takes, and nobody else


def test_scratch_is_kept_for_its_key_alone(monkeypatch):
    monkeypatch.setattr(threads, "_own", SimpleNamespace())
    allocated, used = [], []

    def allocate(key):
        allocated.append([key])
        return allocated[-1]

    for key in "aabbacdca":
        over_chunks(lambda *chunk: used.append(chunk), 10, 10, (key, lambda key=key: allocate(key)))
    assert [scratch for _, _, scratch in used] == [[key] for key in "aabbacdca"]
    assert allocated == [["a"], ["b"], ["c"], ["d"], ["a"]]  # the last three are kept


@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of fork, from Python 3.12 on: on purpose
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    scores = np.random.default_rng(0).random((512, 2048), np.float32)
    expected = solve_mask(scores, "2:4").mask
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # it would wait for threads that do not exist
        os._exit(0 if np.array_equal(solve_mask(scores, "2:4").mask, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
