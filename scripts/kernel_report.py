"""Compile every GPU kernel without a GPU, and say what came out: registers, spills, loops, the least time.

scripts/kernel_report.py                 a table in Markdown, for docs/measured.md
scripts/kernel_report.py --check         compare with what tests/kernels/gpu/instruction_counts.json holds; exit code 1
scripts/kernel_report.py --record        write that file, for this version of Triton
scripts/kernel_report.py --trips         count in the interpreter how often loops run, into loop_trips.json

Times are no measurements: instructions, their trips and pipes on an H200 at 1.9 GHz, as if nothing ever waited.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import machine_code  # noqa: E402 a neighbour
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

COUNTS = ROOT / "tests/kernels/gpu/instruction_counts.json"
TRIPS = ROOT / "tests/kernels/gpu/loop_trips.json"
MODULES = ("exact_variants", "entropic_kernel", "standard_kernel")  # with variants(), see gpu/variant.py
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAIN, DTYPE = "sm_90", "bf16"
PATTERNS = ((1, 2), (2, 4), (3, 5), (4, 8), (6, 12), (8, 16), (12, 24), (16, 32), (24, 48), (32, 64))
CHECKED = ((2, 4), (3, 5), (4, 8), (8, 16), (16, 32), (32, 64))  # every form that a tile can take
OTHERS = ((2, 4), (8, 16))  # for the other targets
GROWTH = 1.10  # of a loop, before the check fails
INNER_SPILLS, LOOP_SPILLS, KERNEL_SPILLS = (
    0,
    160,
    1200,
)  # loads and stores: once they cost little, in an inner loop much
SCORES, CLOCK_HZ, SCHEDULERS, BYTES_PER_S = 8192**2, 1.9e9, 132 * 4, 4.3e12


Patterns: TypeAlias = tuple[tuple[int, int], ...]


class Compiled(NamedTuple):
    """What became of a variant."""

    key: str  # kernel, pattern, type and target
    loops: list[machine_code.Loop]  # first what is in no loop
    registers: int
    shared: int  # bytes
    total_warps: float  # for 8192² scores
    widths: set[str]  # names of the instructions that load and store globally


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="fail if a loop grew by more than 10 %% or registers spill"
    )
    parser.add_argument("--record", action="store_true", help="write the instruction counts of this version of Triton")
    parser.add_argument("--trips", action="store_true", help="write how often the loops run; takes minutes")
    parser.add_argument("--kernel", action="append", help="only this one; may be repeated")
    parser.add_argument("--counts", type=Path, default=COUNTS, help="the file to check against, or to write")
    options = parser.parse_args()
    if options.trips:
        return count_trips()
    patterns, others = (CHECKED, OTHERS[:1]) if options.check else (PATTERNS, OTHERS)
    found = list(compile_all(options.kernel, patterns, others))
    if options.record:
        recorded = read(options.counts)
        recorded[version()] = recorded.get(version(), {}) | {
            one.key: [loop.size for loop in one.loops] for one in found
        }
        options.counts.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    if options.check:
        recorded = read(options.counts).get(version(), {})
        complaints = [text for one in found for text in complaints_about(one, recorded.get(one.key))]
        print("\n".join(complaints) or f"{len(found)} kernels compiled as they should with Triton {triton.__version__}")
        return bool(complaints)
    print(table(found))
    return 0


def read(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, or nothing."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def version() -> str:
    """Triton's, without the last number."""
    return ".".join(triton.__version__.split(".")[:2])


def compile_all(only: list[str] | None, patterns: Patterns, others: Patterns) -> Iterator[Compiled]:
    """Every kernel for the main target, and those of a few patterns for the others."""
    for module in MODULES:
        if not (ROOT / f"tsenor_cli/kernels/gpu/{module}.py").exists():
            continue
        variants = importlib.import_module(f"tsenor_cli.kernels.gpu.{module}").variants
        for name, target in TARGETS.items():
            for n, m in patterns if name == MAIN else others:
                for variant in variants(m, n, DTYPE, target.warp_size):
                    if not only or variant.name in only:
                        yield compiled(variant, n, m, name)


def compiled(variant: Any, n: int, m: int, target: str) -> Compiled:  # noqa: ANN401
    """Compile what a launch would compile, with the alignments that a launch would find."""
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        {name: variant.signature.get(name, "constexpr") for name in names},
        variant.constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    result = triton.compile(source, target=TARGETS[target], options=variant.options)
    if "cubin" in result.asm:
        text, registers = disassemble(result.asm["cubin"])
    else:
        text = result.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1])
    warps = SCORES / scores_of_program(variant.constants, m) * variant.warps
    widths = set(machine_code.global_widths(text))
    key = f"{variant.name} {n}:{m} {DTYPE} {target}"
    return Compiled(key, machine_code.loops_of(text), registers, result.metadata.shared, warps, widths)


def scores_of_program(constants: dict[str, int], m: int) -> int:
    """How many scores a program solves."""
    if "G" in constants:
        return constants["G"] * m
    return constants["L"] // (constants.get("RO", 1) * constants.get("CO", 1)) * m * m


def disassemble(cubin: bytes) -> tuple[str, int]:
    """→ SASS, and the number of registers."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([folder / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    return text, int(re.findall(r"REG:(\d+)", usage)[-1])


def complaints_about(one: Compiled, before: list[int] | None) -> Iterator[str]:
    """What is worse than it was, if that is recorded, or than it may be."""
    for number, loop in enumerate(one.loops):
        if loop.spills > (KERNEL_SPILLS, LOOP_SPILLS, INNER_SPILLS)[min(loop.depth, 2)]:
            yield f"{one.key}: {loop.spills} spills in loop {number}"
    # The hint in tile.py is untrue: no entry may be loaded together with its neighbour. Queues are 64 bits wide.
    wide = {name for name in one.widths if name.startswith("LDG") and re.search(r"\.(64|128)", name)}
    if wide and not one.key.startswith(("standard", "arrange", "settle")):
        yield f"{one.key}: wide loads {sorted(wide)}, an entry has left its lane"
    if before is None:
        return
    sizes = [loop.size for loop in one.loops]
    if len(before) != len(sizes):
        yield f"{one.key}: {len(sizes) - 1} loops, not {len(before) - 1}"
        return
    for number, (old, new) in enumerate(zip(before, sizes, strict=True)):
        if new > GROWTH * old:
            yield f"{one.key}: loop {number} has {new} instructions, not {old}"


def table(found: list[Compiled]) -> str:
    """Markdown: a line for every kernel."""
    trips = read(TRIPS)
    lines = [
        f"Triton {triton.__version__}. Loops: instructions (least cycles of a warp) × trips. Least ms and traffic",
        f"are those of 8192² scores in {DTYPE}, read once, and of their mask.",
        "",
        "| kernel | registers | spills, in loops | shared, bytes | in no loop | loops | least ms | traffic, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(row_of(one, trips.get(one.key.removesuffix(f" {MAIN}"))) for one in found)])


def row_of(one: Compiled, trips: list[float] | None) -> str:
    """A line of the table; the cycles are those of the main target, as far as trips are known."""
    whole, *loops = one.loops
    inner = sum(loop.spills for loop in loops)
    traffic = f"{SCORES * (2 + 1) / BYTES_PER_S * 1e3:.3f}"
    least, once, shown = "–", f"{whole.size}", ", ".join(f"{loop.size}" for loop in loops)
    if trips is not None and len(trips) == len(loops):
        cycles = whole.cycles + sum(loop.cycles * count for loop, count in zip(loops, trips, strict=True))
        least = f"{cycles * one.total_warps / SCHEDULERS / CLOCK_HZ * 1e3:.2f}"
        once = f"{whole.size} ({whole.cycles})"
        each = zip(loops, trips, strict=True)
        shown = ", ".join(f"{loop.size} ({loop.cycles}) × {count:g}" for loop, count in each)
    cells = (one.key, one.registers, f"{whole.spills + inner}, {inner}", one.shared, once, shown, least, traffic)
    return f"| {' | '.join(map(str, cells))} |"


def count_trips() -> int:
    """Run each kernel of which loop_trips.py knows the solver, in processes of their own: they need the interpreter."""
    code = "import sys; from loop_trips import measure; print(measure(sys.argv[1], *map(int, sys.argv[2:])))"
    trips = read(TRIPS)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    for n, m in PATTERNS:
        for name in ("entropic", "standard", "four" if m == 4 else "draft"):
            command = [sys.executable, "-c", code, name, str(n), str(m), "16" if m <= 16 else "4"]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            trips[f"{name} {n}:{m} {DTYPE}"] = json.loads(answer)
            print(name, n, m, answer.strip())
            TRIPS.write_text(json.dumps(trips, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
