"""Selection networks: which comparisons find the n-th and the (n+1)-th largest of m numbers, for any m.

Source: K. E. Batcher, Sorting networks and their applications (1968), odd-even merge sort, in the form of Knuth,
The Art of Computer Programming vol. 3, 5.2.2M, which needs no power of two. A sort does more than a selection needs:
comparisons that cannot reach the two wanted outputs are left out, and of the others often one half is.
"""

from __future__ import annotations

from typing import NamedTuple


class Comparator(NamedTuple):
    """Put the larger of two places into `high`, the smaller into `low`; only what is read later is wanted."""

    high: int
    low: int
    want_high: bool = True
    want_low: bool = True


def sorting_network(m: int) -> list[Comparator]:
    """Comparators that sort m numbers in descending order (merge exchange)."""
    comparators: list[Comparator] = []
    top = 1 << max(0, (m - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            comparators += [Comparator(i, i + d) for i in range(m - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return comparators


def selection_network(m: int, n: int) -> list[Comparator]:
    """Comparators after which places n - 1 and n hold the n-th and the (n+1)-th largest of m numbers."""
    needed = {n - 1, n}
    kept: list[Comparator] = []
    for high, low, *_ in reversed(sorting_network(m)):
        if high in needed or low in needed:
            kept.append(Comparator(high, low, high in needed, low in needed))
            needed |= {high, low}
    return kept[::-1]
