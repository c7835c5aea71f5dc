#!/usr/bin/env python3
"""Our SparseGPT against llm-compressor's, standard 2:4 on the CPU: time, perplexity and memory, side by side.

    scripts/bench_llm_compressor.py ENVIRONMENT/bin/python CHECKPOINT --calibration TEXT --eval TEXT

The first argument is the Python of llm-compressor's own environment; scripts/peers/run_llm_compressor.py says how to
make one. Both prune the trained CHECKPOINT on the same windows, in turn, in fresh processes; the best time of each
counts, imports left out. Then both prune a random Llama of 1 GiB for the peak of resident memory above the imports,
and their time on it. Linux only. Exits 1 when our perplexity is more than 0.1 % above theirs; the goals for time
(a third) and memory (a half) are printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measure_memory
from safetensors.torch import save_file

from tsenor_cli.calibration.tokens import calibration_windows
from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer
from tsenor_cli.pipeline import evaluate, verify
from tsenor_cli.specs import NMPattern

PEER = Path(__file__).parent / "peers" / "run_llm_compressor.py"
MIB = 2**20
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", type=Path, help="of llm-compressor's environment")
    parser.add_argument("checkpoint", help="a trained Llama-like checkpoint with its tokenizer")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--eval", required=True, metavar="TEXT")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random-samples", type=int, default=8, help="windows of 1024 tokens for the random model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tsenor-peer-") as name:
        folder = Path(name)
        print(f"trained: {args.samples} windows of {args.sequence_length} tokens")
        side_by_side(
            args.python, args.checkpoint, args.calibration, args.samples, args.sequence_length, folder, args.rounds
        )
        better = compare_perplexity(folder, args.eval, args.sequence_length)
        shapes = measure_memory.SHAPES["0.5b"]
        measure_memory.make_checkpoint(folder / "random", measure_memory.GIB, shapes)
        measure_memory.make_text(folder / "random.txt")
        print(f"random: 1 GiB, {shapes}, {args.random_samples} windows of 1024 tokens")
        side_by_side(
            args.python, str(folder / "random"), str(folder / "random.txt"), args.random_samples, 1024, folder, 1
        )
    if not better:
        sys.exit("our perplexity is more than 0.1 % above theirs")


def side_by_side(
    python: Path, checkpoint: str, text: str, samples: int, length: int, folder: Path, rounds: int
) -> None:
    """Both tools, in turn; prints times and peaks."""
    tokenizer = CheckpointTokenizer(Path(checkpoint))
    tokens = calibration_windows(text, tokenizer, samples=samples, length=length)
    save_file({"windows": tokens.windows}, folder / "windows.safetensors")
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(run_peer(python, checkpoint, folder))
        ours.append(run_ours(checkpoint, text, samples, length, folder))
    seconds = [min(run["seconds"] for run in runs) for runs in (ours, theirs)]
    peaks = [min(run["peak"] - run["baseline"] for run in runs) / MIB for runs in (ours, theirs)]
    show("seconds, imports left out", *seconds, goal=0.33)
    show("MiB at the peak, above the imports", *peaks, goal=0.5)


def show(what: str, ours: float, theirs: float, goal: float) -> None:
    print(f"  {what}: {ours:.2f} ours, {theirs:.2f} theirs; {ours / theirs:.3f} (goal {goal:g})")


def run_peer(python: Path, checkpoint: str, folder: Path) -> dict[str, float]:
    clear(folder / "theirs")
    done = subprocess.run(
        [python, PEER, checkpoint, "--tokens", folder / "windows.safetensors", "--out", folder / "theirs"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    found = json.loads(done.stdout)
    seconds = sum(found["seconds"][step] for step in ("load", "oneshot", "save"))
    return {"seconds": seconds, "peak": found["peak_mib"]["save"] * MIB, "baseline": found["peak_mib"]["import"] * MIB}


def run_ours(checkpoint: str, text: str, samples: int, length: int, folder: Path) -> dict[str, float]:
    options = ["--nm", "2:4", "--standard", "--method", "sparsegpt", "--calibration", text, "--samples", str(samples)]
    command = ["prune", checkpoint, *options, "--sequence-length", str(length), "-q", "--overwrite"]
    return measure_memory.run_child(folder, [*command, "-o", str(folder / "ours")])


def compare_perplexity(folder: Path, text: str, length: int) -> bool:
    """Whether ours is no more than 0.1 % above theirs; both must be 2:4."""
    outputs = [str(folder / name) for name in ("ours", "theirs")]
    for output in outputs:
        check = verify(output, NMPattern(2, 4, transposable=False))
        if not check.ok:
            sys.exit(f"{output}: {check.failures[0]}")
    ours, theirs = (evaluate([output], text, sequence_length=length)[0].perplexity for output in outputs)
    show("perplexity", ours, theirs, goal=1.001)
    return ours <= 1.001 * theirs


def clear(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink()


if __name__ == "__main__":
    main()
