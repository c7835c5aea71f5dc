"""How often the loops of a kernel run, counted in Triton's interpreter: in the order in which machine code has them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

GPU = Path(__file__).parent.parent / "tsenor_cli" / "kernels" / "gpu"
Key = tuple[tuple[str, int], ...]  # files and lines, from the kernel to the `while`


@cache
def whiles(path: str) -> dict[int, int]:
    """The first line of the body of every `while` → the line of its condition."""
    tree = ast.parse(Path(path).read_text())
    return {node.body[0].lineno: node.lineno for node in ast.walk(tree) if isinstance(node, ast.While)}


def count_trips(run: Callable[[], None]) -> list[int]:
    """Call `run` and return how often the body of each `while` ran, loops in the order they were come by.

    A function that is called from two places has two loops, as in the machine code.
    """
    trips: dict[Key, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:  # noqa: ANN401
        path = frame.f_code.co_filename
        if not path.startswith(str(GPU)):
            return None
        if event == "line":
            bodies = whiles(path)
            if frame.f_lineno in bodies.values():
                trips.setdefault(key_of(frame, frame.f_lineno), 0)
            elif frame.f_lineno in bodies:
                trips[key_of(frame, bodies[frame.f_lineno])] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    launched = str(GPU / "variant.py")  # what the host code loops over is not in the kernel
    return [count for key, count in trips.items() if launched in {path for path, _ in key}]


def key_of(frame: FrameType, line: int) -> Key:
    """Where a loop is, and from where it was called."""
    key, caller = [(frame.f_code.co_filename, line)], frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith(str(GPU)):
            key.append((caller.f_code.co_filename, caller.f_lineno))
        caller = caller.f_back
    return tuple(reversed(key))


def measure(solve: str, n: int, m: int, programs: int) -> list[float]:
    """Mean trips of a program of the kernel behind `solve`, "standard" or "entropic", on bf16 normal scores."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    import torch

    from tsenor_cli.kernels.gpu import entropic, standard
    from tsenor_cli.kernels.gpu.standard_kernel import variants
    from tsenor_cli.kernels.gpu.variant import tiling

    groups = variants(m, n, "bf16")[0].constants["G"]
    shape = {"entropic": (m, programs * tiling(m).blocks * m), "standard": (programs * groups, m)}[solve]
    function = {"entropic": entropic.solve_entropic, "standard": standard.solve_standard}[solve]
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    trips = count_trips(lambda: function(scores, n, m, torch.empty(shape, dtype=torch.bool), absolute=True) and None)
    return [round(count / programs, 2) for count in trips]
