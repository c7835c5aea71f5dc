"""What fine-tuning with masks kept gives back on the demo model, transposable and standard, at equal steps.

    .venv/bin/python scripts/bench_finetune.py [--steps 200] [--learning-rate 1e-3] [--nm 2:4] [--method alps …]

The dense model is trained in the same way beside them: what it gains is no merit of fine-tuning a sparse one. Prints a
table in Markdown: perplexity on held-out text when pruned, after training, and this beside that of the dense model
trained as much. About ten minutes on two cores; with OMP_WAIT_POLICY=PASSIVE where others compute, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tsenor_cli.calibration.perplexity import measure_perplexity
from tsenor_cli.calibration.tokens import all_windows, calibration_windows
from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer
from tsenor_cli.checkpoint.adapter.whole import load_model
from tsenor_cli.checkpoint.journal import Journal
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import finetune, prune
from tsenor_cli.specs import CalibrationSpec, FinetuneSpec, NMPattern, PruneSpec
from tsenor_cli.training.trainer import train

LENGTH = 128  # tokens of a window, as the demo model was trained
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--nm", default="2:4")
    parser.add_argument("--method", action="append", help="default: magnitude and alps")
    args = parser.parse_args()
    made = subprocess.run([sys.executable, ROOT / "scripts/make_demo_checkpoint.py"], capture_output=True, check=True)
    demo = Path(made.stdout.decode().strip())
    with tempfile.TemporaryDirectory() as folder:
        how = {"steps": args.steps, "learning_rate": args.learning_rate}
        before, trained = dense(demo, Path(folder), how)
        print(f"{args.steps} steps of 8 windows of {LENGTH} tokens, AdamW, learning rate {args.learning_rate:g}\n")
        print("| | before | trained | of the dense one, trained as much |\n|---|---|---|---|")
        print(f"| dense | {before:.2f} | {trained:.2f} | 1.0000 |", flush=True)
        for method in args.method or ["magnitude", "alps"]:
            for transposable in (True, False):
                pattern = NMPattern.parse(args.nm, transposable=transposable)
                pruned, after = sparse(demo, Path(folder), how, pattern, method)
                name = f"{pattern} {pattern.kind}, {method}"
                print(f"| {name} | {pruned:.2f} | {after:.2f} | {after / trained:.4f} |", flush=True)


def specification(model: Path, demo: Path, output: Path, how: dict[str, Any]) -> FinetuneSpec:
    text, held_out = str(demo / "calibration.jsonl"), str(demo / "eval.txt")
    return FinetuneSpec(str(model), output, text, eval_text=held_out, sequence_length=LENGTH, **how)


def dense(demo: Path, folder: Path, how: dict[str, Any]) -> tuple[float, float]:
    """Perplexity of the dense model, and of the same trained without masks on the same windows."""
    checkpoint = open_checkpoint(demo / "checkpoint")
    tokenizer = CheckpointTokenizer(checkpoint.directory)
    spec = specification(checkpoint.directory, demo, folder, how)
    held_out = all_windows(str(demo / "eval.txt"), tokenizer, length=LENGTH)
    windows = calibration_windows(spec.text, tokenizer, samples=spec.steps * spec.batch_size, length=LENGTH).windows
    before = measure_perplexity(checkpoint, held_out, Observer()).perplexity
    model, cpu = load_model(checkpoint), torch.device("cpu")
    train(model, windows, {}, spec, cpu, folder / "trainer", Journal(folder / "journal"), Observer())
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    return before, measure_perplexity(open_checkpoint(folder / "dense"), held_out, Observer()).perplexity


def sparse(demo: Path, folder: Path, how: dict[str, Any], pattern: NMPattern, method: str) -> tuple[float, float]:
    """Perplexity when pruned, and when trained with the masks kept."""
    pruned, output = folder / f"{method}-{pattern.kind}", folder / f"{method}-{pattern.kind}-tuned"
    calibration = CalibrationSpec(str(demo / "calibration.jsonl"), sequence_length=LENGTH)
    calibration_or_none = None if method == "magnitude" else calibration
    prune(PruneSpec(str(demo / "checkpoint"), pruned, pattern, method, calibration=calibration_or_none))
    report = finetune(specification(pruned, demo, output, how))
    assert report.perplexity is not None
    return tuple(report.perplexity[key]["perplexity"] for key in ("before", "after"))


if __name__ == "__main__":
    main()
