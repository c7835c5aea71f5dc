"""What only a machine with a GPU can show: the tests on the card, parity with the CPU engine, and speed.

    scripts/gpu-check [--quick] [--device cuda:0]

1. All tests marked gpu and those of the GPU kernels, on the card; it fails if none ran there.
2. The same masks as the CPU engine, bit for bit, on random, hostile and trained weights of every float type.
3. Seconds of a whole solve_mask on the card, checks included, for 8192×8192 scores and for all linear layers of an
   8B Llama, beside plain torch (the pipeline of the paper), torch.topk, torch's own 2:4 tiles, and copying the scores.
4. A checkpoint of 4 GiB from disk to disk, beside a plain copy.

Prints tables; writes gpu-check.json to $OUT, or to the current directory. Under eight minutes on an H200; --quick
leaves out 3 and 4. Exits 1 when something is wrong, 3 when there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tsenor_cli.device import find_device, why_no_gpu
from tsenor_cli.masks.baselines import plain_torch
from tsenor_cli.masks.blocks import to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "32:64")
PARITY_PATTERNS = (*PATTERNS, "1:4", "3:4", "1:8", "7:8", "4:16", "8:32", "3:5", "6:12", "20:40")
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
SIZE = 8192
GOALS_MS = {"2:4": 2.5, "4:8": 2.5, "8:16": 4.0, "16:32": 7.0}  # exact, bf16, 8192×8192
ENTROPIC_GOALS_MS = {"8:16": 9.0}
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
LAYERS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tests and parity only")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if problem := why_no_gpu():
        print(f"gpu-check: {problem}", file=sys.stderr)
        sys.exit(3)
    device = find_device(args.device)
    torch.cuda.set_device(device)
    found: dict[str, Any] = {"machine": machine(device)}
    print(json.dumps(found["machine"]))
    found["tests"] = run_tests()
    found["parity"] = parity(device)
    if not args.quick:
        found["masks"] = list(bench_masks(device))
        found["llama_8b"] = list(bench_llama(device))
        found["disk_to_disk"] = bench_disk(device)
    target = Path(os.environ.get("OUT", ".")) / "gpu-check.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = found["tests"]["wrong"] + found["parity"]["wrong"]
    print(f"\nfigures in {target}\n" + ("all well" if not wrong else "\n".join(wrong)))
    sys.exit(bool(wrong))


def machine(device: torch.device) -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


# --- tests ------------------------------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """The kernels' own tests and those marked gpu; the variable makes a test fail that does not find the card."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    runs = [["tests/kernels/gpu"], ["tests", "-m", "gpu", "--ignore", "tests/kernels/gpu"]]
    wrong, lines = [], []
    for selection in runs:
        done = subprocess.run(
            [*command, *selection],
            cwd=ROOT,
            env=os.environ | {"TSENOR_TEST_DEVICE": "cuda"},
            capture_output=True,
            text=True,
            check=False,
        )
        lines.append(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:])
        print(f"tests {selection[-1]:24} {lines[-1]}", flush=True)
        if done.returncode:  # 5: none was there
            wrong.append(f"pytest {' '.join(selection)} ended with {done.returncode}")
            print(done.stdout[-6000:], done.stderr[-2000:])
    return {"lines": lines, "wrong": wrong}


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(device: torch.device) -> dict[str, Any]:
    """Exact and standard masks are those of the CPU engine; entropic ones feasible, and as good within 0.1 %."""
    wrong, compared = [], 0
    for name, scores in problems():
        for text in PARITY_PATTERNS:
            for transposable in (True, False):
                pattern = NMPattern.parse(text, transposable=transposable)
                part = scores[: scores.shape[0] // pattern.m * pattern.m, : scores.shape[1] // pattern.m * pattern.m]
                ours, theirs = solve_mask(part, pattern, device=str(device)), solve_mask(part, pattern, device="cpu")
                compared += ours.blocks
                if not torch.equal(ours.mask, theirs.mask):
                    differing = int((ours.mask != theirs.mask).sum())
                    wrong.append(f"{name}, {pattern} {pattern.kind}: {differing} of {part.numel()} entries differ")
            if not wrong:
                good, best = solve_mask(part, text, solver="entropic", device=str(device)), solve_mask(part, text)
                if good.objective > best.upper_bound * (1 + 1e-9) or good.upper_bound < best.objective * (1 - 1e-9):
                    wrong.append(f"{name}, {text} entropic: {good.objective} and its bound do not fit the optimum")
    print(f"parity: {compared:,} blocks compared with the CPU engine, {len(wrong)} problems", flush=True)
    return {"blocks": compared, "wrong": wrong}


def problems() -> Iterator[tuple[str, torch.Tensor]]:
    """Scores that are random, hostile, or the weights of a model trained here."""
    import hard_scores

    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        yield f"normal {dtype}", torch.randn(768, 768, generator=generator).abs().to(dtype)
    for name in hard_scores.ALL:
        yield name, torch.from_numpy(hard_scores.make(name, (384, 384)))
    for name, weight in trained_weights():
        yield name, weight.abs()


def trained_weights() -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, str(ROOT / "scripts" / "make_demo_checkpoint.py"), f"{folder}/demo", "--steps", "60"]
        subprocess.run(make, check=True, capture_output=True)
        for path in sorted(Path(folder, "demo", "checkpoint").glob("*.safetensors")):
            tensors = load_file(path)
            yield from ((name, tensors[name]) for name in tensors if tensors[name].ndim == 2 and "layers.0." in name)


# --- speed ------------------------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], object], rounds: int = 7) -> float:
    """The median of some rounds, after two that warm up; the card is waited for before and after."""
    seconds = []
    for turn in range(rounds + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def bench_masks(device: torch.device) -> Iterator[dict[str, Any]]:
    """8192×8192 scores that lie on the card."""
    scores = torch.randn(SIZE, SIZE, device=device).abs()
    narrow = scores.to(torch.bfloat16)
    target = torch.empty_like(scores)
    copy = milliseconds(lambda: target.copy_(scores))
    print(f"\ncopying float32 scores: {copy:.3f} ms, {2 * scores.nbytes / copy / 1e9:.2f} TB/s read and written")
    print("exact:  bf16   goal  float32 entropic   goal    top-n     topk     plain torch, ms")
    for text in PATTERNS:
        n, m = map(int, text.split(":"))
        row = {
            "pattern": text,
            "exact_bf16_ms": milliseconds(lambda text=text: solve_mask(narrow, text)),
            "exact_ms": milliseconds(lambda text=text: solve_mask(scores, text)),
            "entropic_bf16_ms": milliseconds(lambda text=text: solve_mask(narrow, text, solver="entropic")),
            "standard_bf16_ms": milliseconds(lambda text=text: solve_mask(narrow, text, transposable=False)),
            "topk_bf16_ms": milliseconds(lambda n=n, m=m: row_wise(narrow, n, m)),
            "plain_torch_ms": plain_ms(scores, n, m),
            "copy_ms": copy,
        }
        if text == "2:4":
            row["torch_semi_structured_tile_ms"] = semi_structured_ms(narrow)
        print(
            f"{text:6} {row['exact_bf16_ms']:8.3f} {GOALS_MS.get(text, float('nan')):6.1f} {row['exact_ms']:8.3f} "
            f"{row['entropic_bf16_ms']:8.3f} {ENTROPIC_GOALS_MS.get(text, float('nan')):6.1f} "
            f"{row['standard_bf16_ms']:8.3f} {row['topk_bf16_ms']:8.3f} {row['plain_torch_ms']:9.1f}",
            flush=True,
        )
        yield row


def row_wise(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A standard mask as one writes it with torch.topk."""
    groups = scores.view(-1, m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, value=True)


def plain_ms(scores: torch.Tensor, n: int, m: int) -> float:
    """The pipeline of the paper in plain torch, in proportion from as many blocks as fit the card with ease."""
    blocks = to_blocks(scores, m)
    part = blocks[: max(1, (1 << 24) // (m * m))]
    return milliseconds(lambda: plain_torch.solve(part, n), rounds=1) * len(blocks) / len(part)


def semi_structured_ms(scores: torch.Tensor) -> float | None:
    """The greedy 2:4 tiles of torch itself, where this build has them."""
    try:
        return milliseconds(lambda: torch._sparse_semi_structured_tile(scores))  # noqa: SLF001  (its only name)
    except (RuntimeError, AttributeError) as error:
        print(f"torch._sparse_semi_structured_tile: {str(error).splitlines()[0]}")
        return None


def bench_llama(device: torch.device) -> Iterator[dict[str, Any]]:
    """All linear layers of an 8B Llama; the weights of one layer, bf16, stand for those of all."""
    weights = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in LLAMA_8B]
    for text in PATTERNS:
        layer = milliseconds(lambda text=text: [solve_mask(w, text, absolute=True) for w in weights], rounds=3)
        row = {"pattern": text, "seconds": LAYERS * layer / 1e3}
        print(f"Llama 8B, all linear layers, exact {text}: {row['seconds']:.3f} s", flush=True)
        yield row


def bench_disk(device: torch.device) -> dict[str, Any]:
    """A checkpoint from disk to disk with masks from the card and from the CPU, beside copying its files."""
    import measure_memory

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure_memory.make_checkpoint(folder / "model", 4 * measure_memory.GIB, measure_memory.SHAPES["8b"])
        started = time.perf_counter()
        shutil.copytree(folder / "model", folder / "copy")
        os.sync()
        found["copy_s"] = time.perf_counter() - started
        shutil.rmtree(folder / "copy")
        for place in (str(device), "cpu"):
            command = [sys.executable, "-m", "tsenor_cli", "prune", str(folder / "model"), "--nm", "8:16", "--json"]
            done = subprocess.run(
                [*command, "-o", str(folder / "out"), "--overwrite", "--device", place],
                capture_output=True,
                text=True,
                check=True,
            )
            found[f"{place}_s"] = json.loads(done.stdout)["summary"]["seconds"]
    print(f"4 GiB from disk to disk, 8:16: {found}", flush=True)
    return found


if __name__ == "__main__":
    main()
