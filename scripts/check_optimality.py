#!/usr/bin/env python3
"""Hold the mask of every block of a checkpoint's weights against an independent exact solver.

    scripts/check_optimality.py CHECKPOINT [--nm N:M ...] [--tensors COUNT]

Blocks of 4 are judged by enumerating all masks, larger ones by OR-tools' min-cost flow. Exit 1 if the kept sum of
any block is more than 1e-6 (relative) below the judge's, or above it, or if the certificate does not cover it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles import all_masks, best_by_flow

from tsenor_cli.checkpoint.layouts import to_matrices
from tsenor_cli.masks.blocks import to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pipeline import plan_prune
from tsenor_cli.specs import NMPattern, PruneSpec

PATTERNS = ("1:4", "2:4", "3:4", "2:8", "4:8", "4:16", "8:16", "8:32", "16:32", "32:64")
TOLERANCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--nm", action="append", help=f"pattern; repeatable [{' '.join(PATTERNS)}]")
    parser.add_argument("--tensors", type=int, help="only the first so many prunable tensors [all]")
    args = parser.parse_args()
    with multiprocessing.Pool() as pool:
        failed = [text for text in args.nm or PATTERNS if not check(args.checkpoint, text, args.tensors, pool)]
    if failed:
        sys.exit(f"not optimal: {', '.join(failed)}")


def check(checkpoint: str, text: str, tensors: int | None, pool: multiprocessing.pool.Pool) -> bool:
    """Check one pattern and print one line."""
    pattern, started = NMPattern.parse(text), time.perf_counter()
    worst = above = 0.0
    blocks = 0
    for item in plan_prune(PruneSpec(checkpoint, Path("unused"), pattern)).pruned[:tensors]:
        scores = to_matrices(item.tensor.read(), item.layout).abs()
        solution = solve_mask(scores, pattern)
        weights = to_blocks(scores, pattern.m).double().numpy()
        kept = (weights * to_blocks(solution.mask, pattern.m).numpy()).sum(axis=(1, 2))
        best = judge(weights, pattern, pool)
        shortfall = (best - kept) / np.maximum(best, np.finfo(np.float64).tiny)
        worst, above = max(worst, shortfall.max()), max(above, -shortfall.min())
        above = max(above, best.sum() / solution.upper_bound - 1)
        blocks += len(weights)
    seconds = time.perf_counter() - started
    good = worst <= TOLERANCE and above <= 1e-9
    verdict = "optimal" if good else "NOT OPTIMAL"
    print(f"{text:>6}: {blocks:9,} blocks, worst shortfall {worst:.1e}, {verdict}, {seconds:.0f} s", flush=True)
    return good


def judge(blocks: np.ndarray, pattern: NMPattern, pool: multiprocessing.pool.Pool) -> np.ndarray:
    """The best possible sum of every block [B, M, M]."""
    if pattern.m == 4:
        masks = all_masks(pattern.n, 4).reshape(-1, 16).astype(np.float64)
        return (blocks.reshape(-1, 16) @ masks.T).max(axis=1)
    return np.array(pool.map(partial(best_by_flow, n=pattern.n), blocks, chunksize=64))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the pool has the other core
    main()
