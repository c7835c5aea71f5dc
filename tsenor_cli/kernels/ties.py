"""The tie rule: of all optimal masks, the one that keeps the largest sum of this table (docs/decisions/0003)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else late: GPU kernels, which need these numbers of bits, are compiled where there is no NumPy
    import numpy as np
    import numpy.typing as npt

SCORE_BITS = 55  # scores become integers below 2^55 ...
TIE_BITS = 23  # ... and tie terms integers below 2^23 are added: less than 2^-31 of the largest score
_SYMMETRIC_BITS, _OTHER_BITS = 17, 5


@cache
def tie_table(n: int, m: int) -> npt.NDArray[np.int64]:
    """The tie term of every entry of an m×m block, int64 [m, m], at least 0, below 2^TIE_BITS.

    The top bit is set where (i + j) mod m < n, so that equal scores give a circulant mask, whose counts are right from
    the start. The next bits are as good as random and symmetric, so that a transposed block gets the transposed mask;
    the last ones are not, so that even a symmetric block has one best mask.
    """
    import numpy as np

    i, j = np.indices((m, m)).astype(np.uint64)
    symmetric = _hash(np.minimum(i, j) * np.uint64(m) + np.maximum(i, j)) >> np.uint64(64 - _SYMMETRIC_BITS)
    other = _hash(i * np.uint64(m) + j + np.uint64(m * m)) >> np.uint64(64 - _OTHER_BITS)
    circulant = ((i + j) % np.uint64(m) < np.uint64(n)).astype(np.uint64)
    table = ((circulant << np.uint64(_SYMMETRIC_BITS) | symmetric) << np.uint64(_OTHER_BITS) | other).astype(np.int64)
    table.setflags(write=False)
    return table


def _hash(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014): the same on every machine, and in any language."""
    import numpy as np

    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
