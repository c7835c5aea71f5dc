"""What only a machine with a GPU can show: the tests on the card, parity with the CPU engine, and speed.

    scripts/gpu-check [--only tests parity masks llama disk training] [--device cuda:0]

1. All tests marked gpu and those of the GPU kernels, on the card; it fails if none ran there.
2. The same masks as the CPU engine, bit for bit, on random, hostile and trained weights of every float type.
3. Seconds of a whole solve_mask on the card, checks included, for 8192×8192 scores and for all linear layers of an
   8B Llama, beside plain torch (the pipeline of the paper), torch.topk, torch's own 2:4 tiles, and copying the scores.
4. A checkpoint of 4 GiB from disk to disk, beside a plain copy.
5. The tests of 2:4 training on the card, and `tsenor bench training` on the layers of an 8B Llama.

Prints tables; writes gpu-check.json to $OUT, or to the current directory. Under eight minutes on an H200. Exits 1 when
something is wrong, 3 when there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tsenor_cli.device import find_device, why_no_gpu
from tsenor_cli.kernels import reference
from tsenor_cli.kernels.ties import tie_table
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
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="all if not said")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if problem := why_no_gpu():
        print(f"gpu-check: {problem}", file=sys.stderr)
        sys.exit(3)
    device = find_device(args.device)
    torch.cuda.set_device(device)
    found: dict[str, Any] = {"machine": machine(device)}
    print(json.dumps(found["machine"]))
    target = Path(os.environ.get("OUT", ".")) / "gpu-check.json"
    wrong = []
    for step in args.only:
        started = time.perf_counter()
        try:
            found[step] = STEPS[step](device)
            wrong += found[step].get("wrong", []) if isinstance(found[step], dict) else []
        except Exception as error:  # noqa: BLE001 the other steps have something to say, too
            traceback.print_exc()
            wrong.append(f"{step}: {error}")
        print(f"({step}: {time.perf_counter() - started:.0f} s)", flush=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
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


def run_tests(_device: torch.device) -> dict[str, Any]:
    """The kernels' own tests and those marked gpu."""
    gpu = ["--ignore", "tests/kernels/gpu/test_compile.py", "tests/kernels/gpu"]
    return pytest_on_card([gpu, ["tests/test_gpu.py"]])


def pytest_on_card(runs: list[list[str]]) -> dict[str, Any]:
    """The last line of every run, and what is wrong; the variable makes a test fail that does not find the card."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time is spent compiling
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    wrong, lines = [], []
    for selection in runs:
        log = Path(os.environ.get("OUT", "."), f"gpu-check-{Path(selection[-1]).stem}.log")
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [*command, *selection],
                cwd=ROOT,
                env=os.environ | {"TSENOR_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        said = log.read_text(encoding="utf-8")
        lines.append(said.strip().splitlines()[-1])
        print(f"tests {selection[-1]:24} {lines[-1]}", flush=True)
        if done.returncode:  # 5: none was there
            wrong.append(f"pytest {' '.join(selection)} ended with {done.returncode}")
            print(said[-3000:])
    return {"lines": lines, "wrong": wrong}


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(device: torch.device) -> dict[str, Any]:
    """Exact and standard masks are those of the CPU engine; the bound of entropic ones holds.

    Of a block with two best masks, tie terms included (docs/decisions/0003), each engine may find another: such blocks
    are counted.
    """
    with tempfile.TemporaryDirectory() as folder, workers() as pool:
        make = [sys.executable, str(ROOT / "scripts" / "make_demo_checkpoint.py"), f"{folder}/demo", "--steps", "60"]
        subprocess.run(make, check=True, capture_output=True)
        jobs = [
            pool.submit(compare, text, dtype, str(device), Path(folder, "demo", "checkpoint"))
            for text in PARITY_PATTERNS
            for dtype in DTYPES
        ]
        found = [job.result() for job in jobs]
    compared, tied = (sum(one[k] for one in found) for k in (0, 1))
    wrong = [text for *_, texts in found for text in texts]
    print(f"parity: {compared:,} blocks like the CPU engine's, but {tied} with two best masks, {len(wrong)} problems")
    return {"blocks": compared, "with_two_best_masks": tied, "wrong": wrong}


def compare(text: str, dtype: torch.dtype, device: str, trained: Path) -> tuple[int, int, list[str]]:
    """How many blocks were compared, how many have another mask that is as good, and what was wrong."""
    wrong, compared, tied = [], 0, 0
    for name, scores in problems(dtype, trained):
        for transposable in (True, False):
            pattern = NMPattern.parse(text, transposable=transposable)
            part = scores[: scores.shape[0] // pattern.m * pattern.m, : scores.shape[1] // pattern.m * pattern.m]
            ours, theirs = solve_mask(part, pattern, device=device), solve_mask(part, pattern, device="cpu")
            compared += ours.blocks
            if not torch.equal(ours.mask, theirs.mask):
                differing, as_good = differences(part, ours.mask, theirs.mask, pattern)
                tied += as_good
                if differing > as_good:
                    wrong.append(f"{name}, {pattern} {pattern.kind}: {differing - as_good} blocks differ")
            if transposable:
                good = solve_mask(part, pattern, solver="entropic", device=device)
                if good.objective > theirs.upper_bound * (1 + 1e-9) or good.upper_bound < theirs.objective * (1 - 1e-9):
                    wrong.append(f"{name}, {text} entropic: {good.objective} and its bound do not fit the optimum")
    return compared, tied, wrong


def differences(scores: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, pattern: NMPattern) -> tuple[int, int]:
    """How many blocks have different masks, and how many of them keep the same sum in the integers that count."""
    n, m = pattern.n, pattern.m
    if not pattern.transposable:
        return int((ours != theirs).view(-1, m).any(1).sum()), 0
    blocks, ours, theirs = (to_blocks(x.double() if x.is_floating_point() else x, m) for x in (scores, ours, theirs))
    differing = (ours != theirs).flatten(1).any(1).nonzero().flatten().tolist()
    as_good = 0
    for k in differing:
        w = reference.scaled(blocks[k].numpy())[0] + tie_table(n, m)
        as_good += int(w[ours[k].numpy()].sum() == w[theirs[k].numpy()].sum())
    return len(differing), as_good


def problems(dtype: torch.dtype, trained: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Scores of a type: random, and for float32 hostile ones and the weights of a model trained here, too."""
    import hard_scores
    from safetensors.torch import load_file

    yield f"normal {dtype}", torch.randn(768, 768, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    if dtype is not torch.float32:
        return
    for name in hard_scores.ALL:
        yield name, torch.from_numpy(hard_scores.make(name, (384, 384)))
    for path in sorted(trained.glob("*.safetensors")):
        tensors = load_file(path)
        yield from ((name, tensors[name].abs()) for name in tensors if tensors[name].ndim == 2 and "layers.0." in name)


def workers() -> ProcessPoolExecutor:
    """Most of the time of a first solve is spent compiling, on one core."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(min(14, os.cpu_count() or 1), spawn, torch.set_num_threads, (1,))


def compile_kernels(device: torch.device) -> None:
    """Those that are timed, side by side, into the cache of Triton."""
    calls = [(text, {"solver": "exact"}) for text in PATTERNS] + [(text, {"solver": "entropic"}) for text in PATTERNS]
    calls += [(text, {"transposable": False}) for text in PATTERNS]
    with workers() as pool:
        jobs = [
            pool.submit(compile_kernel, text, options | {"absolute": absolute}, str(device))
            for text, options in calls
            for absolute in (False, True)
        ]
        for job in jobs:
            job.result()


def compile_kernel(text: str, options: dict[str, Any], device: str) -> None:
    scores = torch.ones(64, 64)
    scores[:32, :32] = torch.rand(32, 32)
    for dtype in (torch.bfloat16, torch.float32):
        solve_mask(scores.to(dtype), text, device=device, **options)


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


def kernels_of(work: Callable[[], object]) -> dict[str, float]:
    """What runs on the card, by name, and for how many milliseconds."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        torch.cuda.synchronize()
    found = {event.key[:60]: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def bench_masks(device: torch.device) -> list[dict[str, Any]]:
    """8192×8192 scores that lie on the card."""
    compile_kernels(device)
    rows = []
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
        row["kernels_ms"] = {
            solver: kernels_of(lambda text=text, solver=solver: solve_mask(narrow, text, solver=solver))
            for solver in ("exact", "entropic")
        }
        rows.append(row)
    for row in rows:
        for solver, kernels in row["kernels_ms"].items():
            print(row["pattern"], solver, *(f"{ms:.3f} {name[:28]}," for name, ms in kernels.items()))
    return rows


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


def bench_llama(device: torch.device) -> list[dict[str, Any]]:
    """All linear layers of an 8B Llama; the weights of one layer, bf16, stand for those of all."""
    rows = []
    weights = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in LLAMA_8B]
    for text in PATTERNS:
        layer = milliseconds(lambda text=text: [solve_mask(w, text, absolute=True) for w in weights], rounds=3)
        row = {"pattern": text, "seconds": LAYERS * layer / 1e3}
        print(f"Llama 8B, all linear layers, exact {text}: {row['seconds']:.3f} s", flush=True)
        rows.append(row)
    return rows


def bench_disk(device: torch.device) -> dict[str, Any]:
    """A checkpoint from disk to disk, masks from the card, whose kernels are compiled first, and from the CPU.

    Beside copying its files.
    """
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
        for what, place in (("compiling", str(device)), ("gpu", str(device)), ("cpu", "cpu")):
            command = [sys.executable, "-m", "tsenor_cli", "prune", str(folder / "model"), "--nm", "8:16", "--json"]
            done = subprocess.run(
                [*command, "-o", str(folder / "out"), "--overwrite", "--device", place],
                env=os.environ | {"TRITON_CACHE_DIR": str(folder / "kernels")},
                capture_output=True,
                text=True,
                check=True,
            )
            summary = json.loads(done.stdout)["summary"]
            found |= {f"{what}_s": summary["seconds"], f"{what}_stages": summary["stages"]}
    print(f"4 GiB from disk to disk, 8:16: {found}", flush=True)
    return found


def bench_training(_device: torch.device) -> dict[str, Any]:
    """Tests first: no figure without them."""
    found = pytest_on_card([["-m", "gpu", "tests/bench/test_training.py", "tests/training"]])
    command = [sys.executable, "-m", "tsenor_cli", "bench", "training"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its table goes to our stderr
    if done.returncode:
        return found | {"wrong": [*found["wrong"], f"tsenor bench training ended with {done.returncode}"]}
    return found | json.loads(done.stdout)


STEPS: dict[str, Callable[[torch.device], Any]] = {
    "tests": run_tests,
    "parity": parity,
    "masks": bench_masks,
    "llama": bench_llama,
    "disk": bench_disk,
    "training": bench_training,
}

if __name__ == "__main__":
    main()
