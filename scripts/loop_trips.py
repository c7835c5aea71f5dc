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
Key = tuple[tuple[str, int], ...]  # files and lines, from the kernel to the loop


@cache
def loops(path: str) -> dict[int, int]:
    """The first line of the body of every `while` and `for … in range()` → the line where it begins."""
    tree = ast.parse(Path(path).read_text())
    return {node.body[0].lineno: node.lineno for node in ast.walk(tree) if is_loop(node)}


def is_loop(node: ast.AST) -> bool:
    """Is it one in machine code, too? tl.static_range() is none."""
    if isinstance(node, ast.For):
        return isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "range"
    return isinstance(node, ast.While)


def count_trips(run: Callable[[], None], kernel: str) -> list[int]:
    """Call `run` and return how often the body of each loop of the file `kernel` ran, in the order they were come by.

    A function that is called from two places has two loops, as in the machine code.
    """
    trips: dict[Key, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:  # noqa: ANN401
        path = frame.f_code.co_filename
        if not path.startswith(str(GPU)):
            return None
        if event == "line":
            bodies = loops(path)
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
    return [count for key, count in trips.items() if str(GPU / kernel) in {path for path, _ in key}]


def key_of(frame: FrameType, line: int) -> Key:
    """Where a loop is, and from where it was called."""
    key, caller = [(frame.f_code.co_filename, line)], frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith(str(GPU)):
            key.append((caller.f_code.co_filename, caller.f_lineno))
        caller = caller.f_back
    return tuple(reversed(key))


def measure(solve: str, n: int, m: int, programs: int) -> list[float]:
    """Mean trips of a program on bf16 normal scores; `solve` is "standard", "entropic", "draft" or "four"."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    import torch

    from tsenor_cli.kernels.gpu import entropic, exact, standard
    from tsenor_cli.kernels.gpu.standard_kernel import variants

    groups = variants(m, n, "bf16")[0].constants["G"]
    form = (entropic.entropic_tiling if solve == "entropic" else exact.draft_tiling)(m, 32)
    shape = (programs * groups, m) if solve == "standard" else (m, programs * form.blocks * m)
    function = {"entropic": entropic.solve_entropic, "standard": standard.solve_standard}.get(solve)
    function = function or exact.solve_transposable
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.empty(shape, dtype=torch.bool)
    trips = count_trips(lambda: function(scores, n, m, mask, absolute=True) and None, f"{solve}_kernel.py")
    return [round(count / programs, 2) for count in trips]
