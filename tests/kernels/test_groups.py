"""When a mask counts as proven, entry by entry: what the solvers rely on, and what no random block would show."""

import numpy as np
import pytest

from tsenor_cli.kernels import groups
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.lanes import LANES, lanes, pointer

N, M = 2, 4
CIRCULANT = np.add.outer(np.arange(M), np.arange(M)) % M < N


@compiled
def run_keep(raw, ties, q, u, v, used, kept, objective, counts):
    arrays = pointer(q), pointer(u), pointer(v)
    results = pointer(kept), pointer(objective), pointer(counts)
    return groups.keep(pointer(raw), False, pointer(ties), *arrays, N, M, used, *results)


def keep(beyond, used=LANES):
    """Keep entries whose floored scores lie `beyond` [LANES, M, M] above their thresholds, tie terms not counted."""
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 256, M * M).astype(np.int32)
    u, v = lanes(M, np.int32), lanes(M, np.int32)
    u[:], v[:] = rng.integers(-1000, 1000, (2, M, LANES))
    q, raw = lanes(M * M, np.int32), lanes(M * M, np.float32)
    thresholds = u[:, None] + v[None]
    q[:] = (thresholds + np.moveaxis(beyond, 0, 2)).reshape(M * M, LANES) + ties[:, None]
    raw[:] = 1
    kept, objective = lanes(M * M, np.uint8), lanes(1, np.float64)
    with compiling():
        found = run_keep(raw, ties, q, u, v, used, kept, objective, lanes(M, np.uint8))
    return kept.T.reshape(LANES, M, M) == 1, objective[0], found


def circulant(above=1, below=-2):
    return np.tile(np.where(CIRCULANT, above, below), (LANES, 1, 1))


def test_all_signs_known_and_all_counts_right_is_proven():
    kept, objective, found = keep(circulant())
    assert (kept == CIRCULANT).all()
    assert (objective == N * M).all()
    assert found == (0, 0, 0)


@pytest.mark.parametrize("entry", range(M * M))
@pytest.mark.parametrize("beyond", [0, -1])
def test_an_entry_that_may_lie_on_either_side_is_doubtful(entry, beyond):
    """At its threshold, or less than one below it: a tie term could lift it over."""
    values = circulant()
    values.reshape(LANES, -1)[3, entry] = beyond
    _, objective, found = keep(values)
    assert found == (0, 1 << 3, 0)
    assert objective.tolist() == [0 if t == 3 else N * M for t in range(LANES)]


def test_rows_that_are_wrong_are_doubtful_and_columns_uneven():
    values = circulant()
    values[5, 0, 0] = -2  # its row holds one, its column too
    values[7, 0, [0, 2]] = -2, 1  # its row is right, two columns are not
    values[9, 2:] = 0  # two rows of four in doubt
    _, objective, found = keep(values)
    assert found == (1 << 7, 1 << 5 | 1 << 9, 1 << 9)
    assert objective.tolist() == [0 if t in {5, 7, 9} else N * M for t in range(LANES)]


def test_idle_lanes_do_not_count():
    values = circulant()
    values[6] = 0
    values[8, 0, [0, 2]] = -2, 1
    _, objective, found = keep(values, used=4)
    assert found == (0, 0, 0)
    assert objective.tolist() == [N * M] * 4 + [0] * (LANES - 4)
