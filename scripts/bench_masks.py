"""Quality and speed of the mask engine, each figure beside the goal it is held against, in one run.

    scripts/bench_masks [--model CHECKPOINT] [--peer FILE] [--size 8192] [--json FILE]

First the exact masks are judged by solvers that are not ours: on random scores of three kinds and, with --model, on the
weights of a checkpoint. If one block is off by more than 1e-6, nothing is timed (exit 4). Then every pattern is timed
side by side with what it is compared to, in turn, the best of --rounds counting; what is too slow for the whole matrix
runs on a part of its blocks. Times are of the whole call, from weight to mask, with all checks. --peer names a Python
file with a function exact_mask(weight, n, m), another exact solver to compare with. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from tsenor_cli.bench.machine import machine
from tsenor_cli.bench.measure import Problem, compare
from tsenor_cli.bench.problems import random_problem
from tsenor_cli.checkpoint.layouts import to_matrices
from tsenor_cli.errors import CheckFailed
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pipeline import plan_prune
from tsenor_cli.specs import NMPattern, PruneSpec

JUDGED = ("1:4", "2:4", "3:4", "2:8", "4:8", "4:16", "8:16", "8:32", "16:32", "32:64")
TIMED = ("2:4", "4:8", "8:16", "16:32", "32:64")
TOPK_GOAL = {"2:4": 0.2, "4:8": 0.2, "8:16": 0.35, "16:32": 0.5}  # of torch.topk's time, at most
figures: list[dict[str, object]] = []


def figure(name: str, value: float, goal: float | None = None, *, at_most: bool = True, unit: str = "") -> None:
    """Print one figure beside its goal, and keep it for --json."""
    value = float(value)
    met = None if goal is None else value <= goal if at_most else value >= goal
    verdict = (
        ""
        if met is None
        else f"   (goal {'at most' if at_most else 'at least'} {goal:g}: {'met' if met else 'MISSED'})"
    )
    print(f"  {name:58} {value:10.4g} {unit}{verdict}", flush=True)
    figures.append({"name": name, "value": value, "unit": unit, "goal": goal, "met": met})


def best_of(rounds: int, **work: Callable[[], object]) -> dict[str, float]:
    """Seconds of each, run in turn so that a noisy minute hits all; the best counts."""
    seconds = {name: [] for name in work}
    for run in work.values():
        run()
    for _ in range(rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(times) for name, times in seconds.items()}


# --- quality ----------------------------------------------------------------------------------------------------------


def quality(model: str | None) -> None:
    """Largest shortfall of any judged block, and largest certified gap of any block, for every pattern."""
    print("\nexact against independent judges (enumeration at M = 4, OR-tools elsewhere)")
    random = [
        random_problem(512, 512, "normal", torch.float32, 1),
        random_problem(512, 512, "cubed", torch.float32, 2),
        random_problem(512, 512, "normal", torch.bfloat16, 3),
    ]
    for text in JUDGED:
        pattern = NMPattern.parse(text)
        worst = gap = 0.0
        judged = 0
        for problem in random + (model_problems(model, pattern) if model else []):
            parity = compare(problem, pattern, (), repeat=1, budget_s=1, judged_blocks=2000).parity
            worst, judged = max(worst, parity.worst_shortfall), judged + parity.blocks
            gap = max(gap, solve_mask(problem.scores, pattern).worst_block_gap)
        figure(f"{text}: largest shortfall of {judged} blocks", worst, 1e-6)
        figure(f"{text}: largest certified gap of any block", gap, 1e-6)
    print("\nentropic against exact")
    for text in JUDGED:
        for scores in ("normal", "cubed"):
            problem = random_problem(512, 512, scores, torch.float32, 4)
            optimum, found = (solve_mask(problem.scores, text, solver=solver) for solver in ("exact", "entropic"))
            goal = 0.002 if scores == "normal" and text in {"4:8", "8:16", "16:32"} else 0.01
            figure(f"{text} {scores}: gap", 1 - found.objective / optimum.objective, goal)


def model_problems(model: str, pattern: NMPattern) -> list[Problem]:
    """Magnitudes of up to six prunable weights, from all depths."""
    items = plan_prune(PruneSpec(model, Path("unused"), pattern)).pruned
    chosen = items[:: max(1, len(items) // 6)][:6]
    return [Problem(item.tensor.name, to_matrices(item.tensor.read(), item.layout).abs()) for item in chosen]


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(size: int, rounds: int, peer: ModuleType | None, floor: float) -> None:
    """The whole call against everything it is compared to."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    halves, magnitudes = weight.bfloat16(), weight.abs()
    for text in TIMED:
        pattern = NMPattern.parse(text)
        n, m = pattern.n, pattern.m
        print(f"\n{text}, {size}x{size}, {torch.get_num_threads()} threads")
        work = {
            "exact": lambda pattern=pattern: solve_mask(weight, pattern, absolute=True),
            "halves": lambda pattern=pattern: solve_mask(halves, pattern, absolute=True),
            "topk": lambda n=n, m=m: magnitudes.view(size, -1, m).topk(n, 2).indices,
        }
        if peer is not None:
            array = weight.numpy()
            work["peer"] = lambda n=n, m=m, array=array: peer.exact_mask(array, n, m)
        best = best_of(rounds, **work)
        figure("exact, float32", best["exact"], unit="s")
        figure("exact, bfloat16", best["halves"], unit="s")
        figure("exact / torch.topk along rows", best["exact"] / best["topk"], TOPK_GOAL.get(text))
        if peer is not None:
            figure("peer / exact", best["peer"] / best["exact"], 1, at_most=False)
        figure("exact / reading the matrix once", best["exact"] / floor)
        part = Problem("part", magnitudes[: max(m, 512)])
        slow = compare(part, pattern, ("flow", "plain-torch"), repeat=1, budget_s=8, judged_blocks=100).measurements
        share = len(part.scores) / size
        for one, goal in zip(slow, (80, 100), strict=True):
            figure(f"{one.what} / exact", one.seconds_for_all / share / best["exact"], goal, at_most=False)
        entropic = best_of(
            1, entropic=lambda part=part, pattern=pattern: solve_mask(part.scores, pattern, solver="entropic")
        )
        figure("entropic", entropic["entropic"] / share, unit="s")
        figure("plain torch / entropic", slow[1].seconds_for_all / entropic["entropic"], 8, at_most=False)


def memory_floor(size: int, rounds: int) -> float:
    """Seconds to read the float32 matrix once, with the same threads."""
    words = torch.randn(size, size).view(torch.int32)
    floor = best_of(rounds, floor=words.amax)["floor"]
    print(f"\nreading {size}x{size} float32 once: {floor:.4f} s")
    return floor


def phases() -> None:
    """What a group of sixteen blocks spends its time on: the parts of the kernel alone, in the cache."""
    print("\nwhat the time goes to (one thread, ns per score, parts of the kernel alone in the cache)")
    script = Path(__file__).with_name("bench_phases.py")
    subprocess.run([sys.executable, str(script), *TIMED], check=True)


def growth(rounds: int) -> None:
    """Seconds per score at every size, relative to their geometric mean: linear is 1 everywhere."""
    print("\nhow the time grows: ns per score at every size, relative to the mean of all sizes")
    weights = [torch.randn(1 << k, 1 << k, generator=torch.Generator().manual_seed(k)) for k in range(10, 15)]
    for text in TIMED:
        seconds = {len(weight): np.inf for weight in weights}
        for _ in range(rounds):
            for weight in weights:
                for _ in range(16384 // len(weight)):  # what is short needs more of them to find a quiet moment
                    best = best_of(1, run=lambda weight=weight, text=text: solve_mask(weight, text, absolute=True))
                    seconds[len(weight)] = min(seconds[len(weight)], best["run"] / weight.numel())
        middle = float(np.exp(np.mean(np.log(list(seconds.values())))))
        for size, value in seconds.items():
            figure(f"{text} {size}x{size}: {value * 1e9:.2f} ns per score, relative to the mean", value / middle, 1.2)


def warm(size: int, rounds: int) -> None:
    """A warm start after a change of every score by about 1 %."""
    print("\nwarm starts after a 1 % change of the scores")
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).abs()
    moved = scores * (1 + 0.01 * torch.randn(size, size, generator=torch.Generator().manual_seed(1)))
    for text in ("8:16", "16:32", "32:64"):
        start = solve_mask(scores, text, return_duals=True)
        assert torch.equal(solve_mask(moved.abs(), text, warm_start=start).mask, solve_mask(moved.abs(), text).mask)
        best = best_of(
            rounds,
            cold=lambda text=text: solve_mask(moved, text, absolute=True),
            warm=lambda text=text, start=start: solve_mask(moved, text, absolute=True, warm_start=start),
        )
        figure(f"{text}: warm / cold", best["warm"] / best["cold"], 0.6 if text == "16:32" else None)


FIRST_CALL = """
import time, torch
scores = torch.rand(256, 256)
started = time.perf_counter()
from tsenor_cli import solve_mask
solve_mask(scores, "8:16")
print(time.perf_counter() - started)
"""


def first_call() -> None:
    """From torch imported to the first mask, in a process of its own, with a filled cache."""
    print("\nfirst call of a fresh process")
    command = [sys.executable, "-c", FIRST_CALL]
    seconds = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(4)]
    figure("8:16, 256x256, cache filled", min(seconds[1:]), 1, unit="s")


CERTIFICATE = """
import sys, time
from tsenor_cli.kernels import contract
contract.CERTIFY = sys.argv[1] == "yes"
import numpy as np
from tsenor_cli.kernels import exact
scores = np.abs(np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32))
mask = np.empty(scores.shape, np.bool_)
for text in sys.argv[2:]:
    n, m = map(int, text.split(":"))
    exact.solve_transposable(scores, n, m, mask)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        exact.solve_transposable(scores, n, m, mask)
        times.append(time.perf_counter() - started)
    print(min(times))
"""


def certificate(cache: Path) -> None:
    """The kernel as it is, against one compiled without objective, bound and the search for clean duals."""
    print("\nwhat the certificate costs (kernel alone, 4096x4096)")
    seconds: dict[str, np.ndarray] = {}
    for wanted in ("yes", "no") * 5:
        environment = os.environ | {"TSENOR_CACHE_DIR": str(cache / wanted)}
        command = [sys.executable, "-c", CERTIFICATE, wanted, *TIMED]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
        seconds[wanted] = np.minimum(seconds.get(wanted, np.inf), np.array(lines, float))
    for text, ratio in zip(TIMED, seconds["yes"] / seconds["no"], strict=True):
        figure(f"{text}: with / without", ratio, 1.1)


def load(path: str) -> ModuleType:
    """A Python file as a module, with the folder it lies in to import from."""
    sys.path.insert(0, str(Path(path).parent))
    spec = spec_from_file_location("peer", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint whose weights are judged, too")
    parser.add_argument("--peer", help="a Python file with exact_mask(weight, n, m)")
    parser.add_argument("--size", type=int, default=8192, help="of the square matrix that is timed [8192]")
    parser.add_argument("--rounds", type=int, default=5, help="runs of what is fast [5]")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    args = parser.parse_args()
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, {about['date']}, {about['versions']}")
    try:
        quality(args.model)
    except CheckFailed as error:
        print(error, file=sys.stderr)
        sys.exit(4)
    floor = memory_floor(args.size, args.rounds)
    speed(args.size, args.rounds, load(args.peer) if args.peer else None, floor)
    phases()
    certificate(Path(os.environ.get("TMPDIR", "/tmp")) / f"tsenor-bench-{os.getpid()}")
    growth(args.rounds)
    warm(4096, args.rounds)
    first_call()
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "figures": figures}, indent=1))
    missed = [one["name"] for one in figures if one["met"] is False]
    print(f"\n{len(figures)} figures, {len(missed)} goals missed" + "".join(f"\n  {name}" for name in missed))


if __name__ == "__main__":
    main()
