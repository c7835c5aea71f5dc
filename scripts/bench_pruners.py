#!/usr/bin/env python3
"""What transposable masks cost a calibrated method: its time beside that with standard masks, in turn, in one run.

    scripts/bench_pruners.py [--size 4096] [--nm 2:4 --nm 8:16 --nm 16:32] [--rounds 3] [--method sparsegpt]

Prunes one bfloat16 weight [size, size] whose inputs are correlated. A time is that of the whole call of `prune`, the
factorisation of the Gram matrix included; the best of the rounds counts. ALPS is held to a fixed number of iterations,
so that both kinds do the same work. Parity first: before any time is shown, every mask is checked to be N:M, and
`error <= mask_error` of the report to hold. Exits 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tsenor_cli.masks.invariants import violation
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver, InputStats, PrunedLayer, Pruner
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

GOALS = {"sparsegpt": 1.5, "alps": 2.0}
ALPS_ITERATIONS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--nm", action="append", help="patterns [2:4, 8:16 and 16:32]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", action="append", choices=GOALS, help="[both]")
    args = parser.parse_args()
    weight, gram = example(args.size)
    methods: dict[str, Pruner] = {"sparsegpt": SparseGPT(), "alps": Alps(iterations=ALPS_ITERATIONS)}
    for nm in args.nm or ["2:4", "8:16", "16:32"]:
        for name in args.method or methods:
            best = dict.fromkeys(("standard", "transposable"), float("inf"))
            for _ in range(args.rounds):
                for kind in ("standard", "transposable"):
                    solver = BoundSolver(NMPattern.parse(nm, transposable=kind == "transposable"))
                    seconds, layer = timed(methods[name], weight, gram, solver)
                    check(layer, solver.pattern)
                    best[kind] = min(best[kind], seconds)
            ratio = best["transposable"] / best["standard"]
            print(
                f"{name:9} {nm:>5} [{args.size}, {args.size}]: standard {best['standard']:.2f} s, "
                f"transposable {best['transposable']:.2f} s, ratio {ratio:.2f} (goal {GOALS[name]:g})",
                flush=True,
            )


def example(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram matrix of inputs with scales and correlations."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) * 0.02).to(torch.bfloat16)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    scale = torch.exp(torch.randn(size, generator=generator))
    inputs = (torch.randn(2 * size, size, generator=generator) @ mix) * scale
    return weight, (inputs.T @ inputs).double()


def timed(method: Pruner, weight: torch.Tensor, gram: torch.Tensor, solver: BoundSolver) -> tuple[float, PrunedLayer]:
    stats = InputStats(2 * len(gram), gram.diagonal().clone(), gram.clone())  # anew: factorisations are kept in it
    started = time.perf_counter()
    layer = method.prune(weight, solver, stats)
    return time.perf_counter() - started, layer


def check(layer: PrunedLayer, pattern: NMPattern) -> None:
    problem = violation(layer.solution.mask, pattern)
    found = layer.calibrated
    if problem is not None or found is None or not (found.error or 0) <= (found.mask_error or 0):
        sys.exit(f"{pattern} {pattern.kind}: {problem or 'the update made it worse'}")


if __name__ == "__main__":
    main()
