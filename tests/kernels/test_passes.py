"""The compiled dual passes do exactly what a sort does, bit for bit, on every vector width."""

import ctypes

import numpy as np
import pytest

from tsenor_cli.kernels import coarse, passes
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.lanes import LANES, lanes, pointer

POINTER = ctypes.c_void_p


def expected(q, n, count, furthest, limits):
    """The model, in int64: sort, take the middle, go `beyond` sixteenths further."""

    def middle(x):
        descending = -np.sort(-np.clip(x, *limits), axis=1)
        return (descending[:, n - 1] + descending[:, n]) >> 1

    def move(old, new, beyond):
        old[:] = np.clip(new + ((new - old) * beyond >> 4), *limits)

    q = q.astype(np.int64)
    u, v = np.zeros((2, *q.shape[1:]), np.int64)
    for half in range(2 * count - 1):
        beyond = min(half // 2 * passes.RAMP, furthest) if half < 2 * count - 2 else 0
        if half % 2 == 0:
            move(u, middle(q - v[None]), beyond)
        else:
            move(v, middle((q - u[:, None]).swapaxes(0, 1)), beyond)
    return u, v


@pytest.mark.parametrize("furthest", [0, 6, 10])
@pytest.mark.parametrize("width", [128, 256, 512])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 8), (8, 16), (5, 24), (16, 32), (32, 64), (1, 64)])
def test_same_bits_as_a_sort(n, m, dtype, width, furthest, monkeypatch):
    monkeypatch.setattr(passes, "_vector_bits", lambda: width)
    with compiling():
        address = passes.dual_passes_address.__wrapped__(m, n, np.iinfo(dtype).bits)
    function = ctypes.CFUNCTYPE(None, *[POINTER] * 3, *[ctypes.c_int64] * 5)(address)
    q, u, v = (lanes(rows, dtype) for rows in (m * m, m, m))
    low, high = (0, 1 << 28) if dtype == np.int32 else (-(1 << 15), 1 << 15)
    q[:] = np.random.default_rng(m).integers(low, high, q.shape)
    q[:, 3] = high >> 2  # a lane of equal scores
    q[:, 5] &= high - (high >> 2)
    function(q.ctypes.data, u.ctypes.data, v.ctypes.data, 4, furthest, q.ctypes.data, 64, 2)  # and q again, ahead
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max)
    want_u, want_v = expected(q.reshape(m, m, LANES), n, 4, furthest, limits)
    assert np.array_equal(u, want_u)
    assert np.array_equal(v, want_v)


@compiled
def run_coarsen(q, v, m, work):
    coarse.coarsen(pointer(q), pointer(v), m, coarse.coarse_pointers(work))


@compiled
def run_refine(work, m, v):
    coarse.refine(coarse.coarse_pointers(work), m, pointer(v))


@pytest.mark.parametrize("m", [2, 5, 16, 64])
def test_coarse_numbers_keep_their_upper_bits(m):
    rng = np.random.default_rng(m)
    q, v, work = lanes(m * m, np.int32), lanes(m, np.int32), coarse.coarse(m)
    q[:] = rng.random(q.shape) ** rng.integers(1, 9, LANES) * 2 ** rng.integers(0, 29, LANES)
    q[:, :3] = np.array([0, 1, 2**28 - 1])
    v[:] = rng.integers(-(2**29), 2**29, v.shape)
    with compiling():
        run_coarsen(q, v, m, work)
    shift, mean = work.shift[0], q.mean(axis=0)
    assert (shift >= 0).all()
    assert (mean / 2.0**shift <= 2**14 + 1).all()
    assert (mean[shift > 0] / 2.0 ** shift[shift > 0] >= 2**12).all()  # 2^13 is added to every mean
    centre = work.q * 2.0**shift - q
    clipped = (work.q == 2**15 - 1) | (work.q == -(2**15))
    for t in range(LANES):
        inside = centre[~clipped[:, t], t]
        assert len(inside) == 0 or np.ptp(inside) < 2.0 ** shift[t]
    found = lanes(m, np.int32)
    with compiling():
        run_refine(work, m, found)
    assert np.array_equal(found, np.clip(v >> shift, -(2**15), 2**15 - 1) << shift)
