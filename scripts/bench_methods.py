#!/usr/bin/env python3
"""Perplexity and time of every method on a trained checkpoint: the table of docs/measured.md.

    scripts/bench_methods.py CHECKPOINT --calibration TEXT --eval TEXT [--nm 2:4 --nm 16:32] [--json FILE]

Prunes the checkpoint with each method to each pattern, standard and transposable, verifies each output against the
original, and measures its perplexity on the held-out text. Standard and transposable runs of one method take turns, so
that their times can be compared; the time is that of the pruning methods alone, the replay not included.
Exits 1 when an output does not verify, or the order is not what it should be:
alps < sparsegpt < wanda <= magnitude for every pattern, transposable alps at 16:32 below standard sparsegpt at 2:4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tsenor_cli.pipeline import evaluate, prune, verify
from tsenor_cli.specs import CALIBRATED, METHODS, CalibrationSpec, NMPattern, PruneSpec

Results = dict[tuple[str, str, str], dict[str, float]]  # (method, N:M, kind) → figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a trained checkpoint with its tokenizer")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--eval", required=True, metavar="TEXT", help="text that the model has not seen")
    parser.add_argument("--nm", action="append", help="patterns [2:4 and 16:32]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    patterns = args.nm or ["2:4", "16:32"]
    calibration = CalibrationSpec(args.calibration, samples=args.samples, sequence_length=args.sequence_length)
    (dense,) = evaluate([args.checkpoint], args.eval, sequence_length=args.sequence_length)
    print(f"dense: {dense.perplexity:.2f} on {dense.tokens.windows.numel()} tokens, {dense.dtype}", file=sys.stderr)
    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="tsenor-methods-") as folder:
        for nm in patterns:
            for method in METHODS:
                for kind in ("standard", "transposable"):
                    pattern = NMPattern.parse(nm, transposable=kind == "transposable")
                    spec = PruneSpec(
                        args.checkpoint,
                        Path(folder) / f"{method}-{pattern.n}of{pattern.m}-{kind}",
                        pattern,
                        method,
                        calibration=calibration if method in CALIBRATED else None,
                    )
                    results[method, nm, kind] = measure(spec, args.eval, args.sequence_length)
                    print(method, nm, kind, results[method, nm, kind], file=sys.stderr)
    print(table(results, patterns))
    if args.json:
        rows = [{"method": m, "nm": nm, "kind": kind, **found} for (m, nm, kind), found in results.items()]
        args.json.write_text(json.dumps({"dense": dense.to_dict(), "results": rows}, indent=1) + "\n", encoding="utf-8")
    if wrong := out_of_order(results, patterns):
        sys.exit("\n".join(wrong))


def measure(spec: PruneSpec, text: str, length: int) -> dict[str, float]:
    """Prune, verify, evaluate."""
    report = prune(spec)
    check = verify(str(spec.output), against=spec.model)
    if not check.ok:
        sys.exit(f"{spec.output}: {check.failures[0]}")
    (found,) = evaluate([str(spec.output)], text, sequence_length=length)
    pruned = [record for record in report.tensors if record.action == "pruned"]
    return {
        "perplexity": found.perplexity,
        "error": report.summary.error or 0.0,
        "seconds": sum(record.seconds or 0.0 for record in pruned),
        "solver_seconds": sum(record.solver_seconds or 0.0 for record in pruned),
    }


def table(results: Results, patterns: list[str]) -> str:
    columns = [(nm, kind) for nm in patterns for kind in ("standard", "transposable")]
    lines = ["| | " + " | ".join(f"{nm} {kind}" for nm, kind in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in METHODS:
        cells = [f"{results[method, nm, kind]['perplexity']:.2f}" for nm, kind in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method in METHODS:
        ratios = [
            results[method, nm, "transposable"]["seconds"] / results[method, nm, "standard"]["seconds"]
            for nm in patterns
        ]
        shown = ", ".join(f"{ratio:.2f} at {nm}" for ratio, nm in zip(ratios, patterns, strict=True))
        lines.append(f"time of transposable / standard, {method}: {shown}")
    return "\n".join(lines)


def out_of_order(results: Results, patterns: list[str]) -> list[str]:
    """What should hold and does not."""
    wrong = []
    for nm in patterns:
        for kind in ("standard", "transposable"):
            magnitude, wanda, sparsegpt, alps = (results[method, nm, kind]["perplexity"] for method in METHODS)
            if not alps < sparsegpt < wanda <= magnitude:
                wrong.append(f"{nm} {kind}: not alps < sparsegpt < wanda <= magnitude")
    ours, theirs = results.get(("alps", "16:32", "transposable")), results.get(("sparsegpt", "2:4", "standard"))
    if ours and theirs and not ours["perplexity"] < theirs["perplexity"]:
        wrong.append("transposable alps at 16:32 is not below standard sparsegpt at 2:4")
    return wrong


if __name__ == "__main__":
    main()
