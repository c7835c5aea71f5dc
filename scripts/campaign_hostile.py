#!/usr/bin/env python3
"""Many spoilt checkpoints through `tsenor prune` and `tsenor verify`, each judged as tests/hostile/judge.py says.

    scripts/campaign_hostile.py [--safetensors 1000000] [--configs 50000] [--indexes 150000] [--workers 2] [--first 0]

The tests of tests/hostile take the first 20,000, 2,500 and 2,500. Prints what became of them, the slowest and the
largest; exits 1 if any was not taken well. Three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

JUDGE = Path(__file__).parent.parent / "tests" / "hostile" / "judge.py"
MEMORY = [path for path in ("/dev/shm",) if os.access(path, os.W_OK)]
CHUNK = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--safetensors", type=int, default=1_000_000, help="[1000000]")
    parser.add_argument("--configs", type=int, default=50_000, help="[50000]")
    parser.add_argument("--indexes", type=int, default=150_000, help="[150000]")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time [2]")
    parser.add_argument("--first", type=int, default=0, help="number of the first of each kind [0]")
    arguments = parser.parse_args()
    wanted = {"safetensors": arguments.safetensors, "config": arguments.configs, "index": arguments.indexes}
    faults = 0
    for kind, count in wanted.items():
        ends = arguments.first + count
        chunks = [(kind, first, min(CHUNK, ends - first)) for first in range(arguments.first, ends, CHUNK)]
        with ThreadPoolExecutor(arguments.workers) as pool:
            faults += report(kind, list(pool.map(judged, chunks)))
    sys.exit(bool(faults))


def judged(chunk: tuple[str, int, int]) -> dict[str, Any]:
    """One chunk, in a process of its own."""
    done = subprocess.run(
        [sys.executable, JUDGE, *map(str, chunk), *MEMORY], capture_output=True, text=True, check=False
    )
    if not done.stdout:
        return {"found": {}, "wrong": [f"{chunk}: {done.stderr}"], "slowest_s": 0, "peak_bytes": 0}
    result: dict[str, Any] = json.loads(done.stdout)
    for fault in result["wrong"]:
        print(fault, flush=True)
    return result


def report(kind: str, results: list[dict[str, Any]]) -> int:
    """Print the sums of a kind; how many faults there were."""
    found: Counter[str] = Counter()
    for result in results:
        found.update(result["found"])
    faults = sum(len(result["wrong"]) for result in results)
    slowest, peak = (max((result[key] for result in results), default=0) for key in ("slowest_s", "peak_bytes"))
    print(f"{kind}: {sum(found.values()):,} taken well, {faults} faults, ", end="")
    print(f"slowest {slowest:.2f} s, peak {peak / 2**20:.0f} MiB")
    for what, count in found.most_common():
        print(f"  {count:9,} {what}", flush=True)
    return faults


if __name__ == "__main__":
    main()
