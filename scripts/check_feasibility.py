#!/usr/bin/env python3
"""Solve ten million blocks with the entropic solver, most of them hostile, and count what every mask keeps.

    scripts/check_feasibility.py [--blocks COUNT] [--nm N:M ...]

The blocks of a pattern are those of tests/hard_scores.py, as many of each kind; every second matrix is solved with
settings at which hardly anything converges. Counting is NumPy's. Prints the largest gap to the exact solver of any kind
at the settings that are the default. Exit 1 if a row or a column of any block does not hold n.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import hard_scores

from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

PATTERNS = ("1:4", "2:4", "4:8", "8:16", "16:32")
SIZE = 1920  # of the square matrices: a multiple of every M above
HOSTILE = ({"iterations": 1}, {"tau": 1e4}, {"tau": 0.1}, {"iterations": 30, "local_search": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10_000_000, help="of each pattern, at least [10000000]")
    parser.add_argument("--nm", action="append", help=f"pattern; repeatable [{' '.join(PATTERNS)}]")
    args = parser.parse_args()
    failed = [text for text in args.nm or PATTERNS if not check(NMPattern.parse(text), args.blocks)]
    if failed:
        sys.exit(f"not feasible: {', '.join(failed)}")


def check(pattern: NMPattern, blocks: int) -> bool:
    """Check one pattern and print one line."""
    started, solved, wrong = time.perf_counter(), 0, 0
    lost = {name: np.zeros(2) for name in hard_scores.ALL}  # kept by the exact solver but not by this one, and by it
    for number in range(2 * -(-blocks // (2 * (SIZE // pattern.m) ** 2))):
        name = list(hard_scores.ALL)[number // 2 % len(hard_scores.ALL)]
        scores = hard_scores.make(name, (SIZE, SIZE), seed=number)
        if number % 2:
            found = solve_mask(scores, pattern, solver="entropic", **HOSTILE[number // 2 % len(HOSTILE)])
        else:
            found = solve_mask(scores, pattern, solver="entropic")
            best = solve_mask(scores, pattern).objective
            lost[name] += best - found.objective, best
        wrong += infeasible(found.mask, pattern)
        solved += scores.size // pattern.m**2
    gaps = {name: missing / total for name, (missing, total) in lost.items() if total > 0}
    worst = max(gaps, key=lambda name: gaps[name])
    print(
        f"{pattern.n}:{pattern.m}: {solved:,} blocks, {wrong} infeasible; largest gap {gaps[worst]:.2e} ({worst}), "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return wrong == 0


def infeasible(mask: np.ndarray, pattern: NMPattern) -> int:
    """How many blocks of the mask do not hold n in every row and column."""
    m = pattern.m
    tiles = mask.reshape(SIZE // m, m, SIZE // m, m)
    along_rows, along_columns = tiles.sum(3, dtype=np.uint8), tiles.sum(1, dtype=np.uint8)
    return int(((along_rows != pattern.n).any(1) | (along_columns != pattern.n).any(2)).sum())


if __name__ == "__main__":
    main()
