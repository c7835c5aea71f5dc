"""Selection networks: which comparisons find the n-th and the (n+1)-th largest of m numbers, for any m.

Source: K. E. Batcher, Sorting networks and their applications (1968), odd-even merge sort. A sort does more than a
selection needs: comparisons that cannot reach the two wanted outputs are left out, and of the others often one half is.
The comparisons of one half of the places come before those of the other, as far as that is possible: a compiler keeps
32 values in registers but not 64, and so it has to move each half only once.
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
    """Comparators that sort m numbers in descending order.

    A network for a power of two, without the places from m on: they would hold -∞ and never move.
    """
    size = 1 << (m - 1).bit_length()
    return [comparator for comparator in _sort(0, size) if comparator.low < m]


def selection_network(m: int, n: int) -> list[Comparator]:
    """Comparators after which places n - 1 and n hold the n-th and the (n+1)-th largest of m numbers, in any order."""
    needed = {n - 1, n}
    kept: list[Comparator] = []
    for high, low, *_ in reversed(sorting_network(m)):
        if not kept and {high, low} == needed:
            continue  # it would put the two in order
        if high in needed or low in needed:
            kept.append(Comparator(high, low, high in needed, low in needed))
            needed |= {high, low}
    return kept[::-1]


def _sort(first: int, size: int) -> list[Comparator]:
    if size == 1:
        return []
    half = size // 2
    return _sort(first, half) + _sort(first + half, half) + _merge(first, size, 1)


def _merge(first: int, size: int, step: int) -> list[Comparator]:
    """Merge two sorted sequences: the places first + k * step with even k, and those with odd k."""
    double = 2 * step
    if double >= size:
        return [Comparator(first, first + step)]
    between = [Comparator(k, k + step) for k in range(first + step, first + size - step, double)]
    return _merge(first, size, double) + _merge(first + step, size, double) + between
