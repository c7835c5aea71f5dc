"""The compiled dual passes do exactly what a float32 sort does, bit for bit, on every vector width."""

import ctypes

import numpy as np
import pytest

from tsenor_cli.kernels import passes
from tsenor_cli.kernels.compilation import compiling
from tsenor_cli.kernels.lanes import LANES

POINTER = ctypes.c_void_p


def expected(w, n, count):
    """The model: sort in float32. Subtraction and halved sum are the same IEEE operations, so it is exact."""

    def middle(x):
        descending = -np.sort(-x, axis=1)
        return np.float32(0.5) * (descending[:, n - 1] + descending[:, n])

    v = np.zeros(w.shape[1:], np.float32)
    u = middle(w - v[None])
    for _ in range(count - 1):
        v = middle((w - u[:, None]).swapaxes(0, 1))
        u = middle(w - v[None])
    return u, v


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 8), (8, 16), (5, 24), (16, 32), (32, 64), (1, 64)])
def test_same_bits_as_a_sort(n, m, width, monkeypatch):
    monkeypatch.setattr(passes, "_vector_width", lambda: width)
    with compiling():
        address = passes.dual_passes_address.__wrapped__(m, n)
    function = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, ctypes.c_int64)(address)
    w = np.random.default_rng(m).random((m, m, LANES), np.float32)
    w[..., 3] = 0.25  # a lane of equal scores
    w[..., 5] = np.rint(4 * w[..., 5])
    u, v = np.full((m, LANES), np.nan, np.float32), np.zeros((m, LANES), np.float32)
    function(w.ctypes.data, u.ctypes.data, v.ctypes.data, 3)
    want_u, want_v = expected(w, n, 3)
    assert np.array_equal(u, want_u)
    assert np.array_equal(v, want_v)
