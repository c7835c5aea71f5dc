"""The compiled dual passes do exactly what a sort does, bit for bit, on every vector width."""

import ctypes

import numpy as np
import pytest

from tsenor_cli.kernels import coarse, passes
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.lanes import LANES, lanes, pointer

POINTER = ctypes.c_void_p


def expected(q, n, count, furthest, limits):
    """The model, in int64: sort, take the middle, go twice `beyond` 32nds further."""

    def middle(x):
        descending = -np.sort(-np.clip(x, *limits), axis=1)
        return (descending[:, n - 1] + descending[:, n]) >> 1

    def move(old, new, beyond):
        half = np.clip(new - old, *limits) * beyond >> 5
        old[:] = np.clip(np.clip(new + half, *limits) + half, *limits)

    q = q.astype(np.int64)
    u, v = np.zeros((2, *q.shape[1:]), np.int64)
    for number in range(count):
        beyond = min(number // 2 * passes.RAMP, furthest) if number < count - 1 else 0
        if number % 2 == 0:
            move(u, middle(q - v[None]), beyond)
        else:
            move(v, middle((q - u[:, None]).swapaxes(0, 1)), beyond)
    return u, v


@pytest.mark.parametrize(("count", "furthest"), [(2, 10), (7, 0), (7, 6), (7, 10)])
@pytest.mark.parametrize(("width", "by_xor"), [(128, False), (256, False), (512, False), (512, True)])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 8), (8, 16), (5, 24), (16, 32), (32, 64), (1, 64)])
def test_same_bits_as_a_sort(n, m, dtype, width, by_xor, furthest, count, monkeypatch):
    monkeypatch.setattr(passes, "_vector_bits", lambda: width)
    monkeypatch.setattr(passes, "_minima_wait", lambda: by_xor)
    with compiling():
        address = passes.dual_passes_address.__wrapped__(m, n, np.iinfo(dtype).bits)
    function = ctypes.CFUNCTYPE(None, *[POINTER] * 3, *[ctypes.c_int64] * 5)(address)
    q, u, v = (lanes(rows, dtype) for rows in (m * m, m, m))
    low, high = (0, 1 << 28) if dtype == np.int32 else (-(1 << 15), 1 << 15)
    q[:] = np.random.default_rng(m).integers(low, high, q.shape)
    q[:, 3] = high >> 2  # a lane of equal scores
    q[:, 5] &= high - (high >> 2)
    function(q.ctypes.data, u.ctypes.data, v.ctypes.data, count, furthest, q.ctypes.data, 64, 2)  # and q again, ahead
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max)
    want_u, want_v = expected(q.reshape(m, m, LANES), n, count, furthest, limits)
    assert np.array_equal(u, want_u)
    assert np.array_equal(v, want_v)


@compiled
def run_coarsen(q, u, v, m, work):
    coarse.coarsen(pointer(q), pointer(u), pointer(v), m, coarse.coarse_pointers(work))


@compiled
def run_refine(work, m, v):
    coarse.refine(coarse.coarse_pointers(work), m, pointer(v))


@pytest.mark.parametrize("m", [2, 5, 16, 64])
def test_coarse_numbers_are_the_upper_bits_of_what_is_left(m):
    rng = np.random.default_rng(m)
    q, u, v, work = lanes(m * m, np.int32), lanes(m, np.int32), lanes(m, np.int32), coarse.coarse(m)
    q[:] = rng.random(q.shape) ** rng.integers(1, 9, LANES) * 2 ** rng.integers(0, 29, LANES)
    q[:, :3] = np.array([0, 1, 2**28 - 1])
    u[:], v[:] = rng.integers(-(2**18), 2**18, (2, m, LANES))
    v[0] = np.linspace(-(2**29), 2**29, LANES)
    work.v[:] = 1
    with compiling():
        run_coarsen(q, u, v, m, work)
    left = q.reshape(m, m, LANES) - u[:, None] - v[None]
    shift, mean = work.shift[0], np.abs(left[:: coarse.EVERY]).mean(axis=(0, 1))
    assert (shift >= 0).all()
    assert (mean / 2.0**shift <= 2**14 + 1).all()
    assert (mean[shift > 0] / 2.0 ** shift[shift > 0] >= 2**12).all()  # 2^13 is added to every mean
    assert np.array_equal(work.q.reshape(m, m, LANES), np.clip(left >> shift, -(2**15), 2**15 - 1))
    assert (work.v == 0).all()


def test_what_was_found_in_16_bits_is_added():
    work, v = coarse.coarse(5), lanes(5, np.int32)
    found, before = np.array([[-5], [0], [1000], [32767], [-32768]]), np.array([[7], [-8], [9], [-10], [11]])
    work.shift[:], work.v[:], v[:] = np.arange(LANES) + 4, found, before
    with compiling():
        run_refine(work, 5, v)
    exact = before + (found << work.shift[0])
    assert np.abs(exact).max() > passes.LIMIT
    assert (np.abs(v) <= passes.LIMIT).all()
    small = np.abs(exact) < passes.LIMIT - 2**19
    assert np.array_equal(v[small], exact[small])
