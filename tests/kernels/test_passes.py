"""The compiled dual passes do exactly what a sort does, bit for bit, on every vector width."""

import ctypes

import numpy as np
import pytest

from tsenor_cli.kernels import passes
from tsenor_cli.kernels.compilation import compiling
from tsenor_cli.kernels.lanes import LANES, lanes

POINTER = ctypes.c_void_p


def expected(q, n, count, furthest):
    """The model, in int64: sort, take the middle, go `beyond` sixteenths further."""

    def middle(x):
        descending = -np.sort(-x, axis=1)
        return (descending[:, n - 1] + descending[:, n]) >> 1

    q = q.astype(np.int64)
    u, v = np.zeros((2, *q.shape[1:]), np.int64)
    for half in range(2 * count - 1):
        beyond = min(half // 2 * passes.RAMP, furthest) if half < 2 * count - 2 else 0
        if half % 2 == 0:
            u += (new := middle(q - v[None])) - u + ((new - u) * beyond >> 4)
        else:
            v += (new := middle((q - u[:, None]).swapaxes(0, 1))) - v + ((new - v) * beyond >> 4)
    return u, v


@pytest.mark.parametrize("furthest", [0, 6, 10])
@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 8), (8, 16), (5, 24), (16, 32), (32, 64), (1, 64)])
def test_same_bits_as_a_sort(n, m, width, furthest, monkeypatch):
    monkeypatch.setattr(passes, "_vector_width", lambda: width)
    with compiling():
        address = passes.dual_passes_address.__wrapped__(m, n)
    function = ctypes.CFUNCTYPE(None, *[POINTER] * 3, *[ctypes.c_int64] * 5)(address)
    q, u, v = (lanes(rows, np.int32) for rows in (m * m, m, m))
    q[:] = np.random.default_rng(m).integers(0, 1 << 28, q.shape)
    q[:, 3] = 1 << 26  # a lane of equal scores
    q[:, 5] &= 3 << 26
    function(q.ctypes.data, u.ctypes.data, v.ctypes.data, 4, furthest, q.ctypes.data, 64, 2)  # and q again, ahead
    want_u, want_v = expected(q.reshape(m, m, LANES), n, 4, furthest)
    assert np.array_equal(u, want_u)
    assert np.array_equal(v, want_v)
