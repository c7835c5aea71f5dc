"""The kernels compile for every GPU, without one, into what they were: as many instructions in a loop, no more spills.

In processes of their own, as this one may have Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "scripts"))

import machine_code  # noqa: E402 not a package


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "scripts/kernel_report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("kernel", ["four", "draft", "arrange", "settle", "entropic", "standard"])
def test_kernels_compile_as_they_should(kernel):
    result = run("--check", "--kernel", kernel)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_loop_that_has_grown_is_found(tmp_path):
    """The recorded numbers a fifth smaller: everything has grown."""
    import json

    counts = json.loads((ROOT / "tests/kernels/gpu/instruction_counts.json").read_text())
    for kernels in counts.values():
        for key, sizes in kernels.items():
            kernels[key] = [int(0.8 * size) for size in sizes]
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    result = run("--check", "--kernel", "standard", "--counts", str(tmp_path / "counts.json"))
    assert result.returncode == 1
    assert "standard 2:4 bf16 sm_90: loop 1 has" in result.stdout


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/                   BRA.DIV UR5, `(.L_x_3) ;
.L_x_1:
        /*0040*/                   FMUL R2, R2, R3 ;
        /*0050*/                   MUFU.RSQ R4, R2 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SHFL.BFLY PT, R4, R2, 0x1, 0x1f ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""


def test_loops_are_found_in_machine_code():
    whole, outer, inner = machine_code.loops_of(SASS)
    assert whole.names == {"LDC": 1, "EXIT": 2, "STG": 1}
    assert outer.names == {"FADD": 1, "BRA": 2}
    assert inner.names == {"FMUL": 1, "MUFU": 1, "STL": 1, "BRA": 1}
    assert [whole.depth, outer.depth, inner.depth] == [0, 1, 2]
    assert (inner.spills, inner.cycles) == (1, 8)
    assert machine_code.global_widths(SASS) == {"STG.E.64": 1}


def test_trips_are_counted():
    """In a process with the interpreter: a standard 3:8 mask is chosen in three rounds."""
    code = "from loop_trips import measure; print(measure('standard', 3, 8, 2))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout == "[3.0]\n"
