"""Runs the command line in forked children under shim.c, which ends them, or fails their calls, wherever one likes.

A server process imports everything once; what a child costs is the run alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

SHIM = Path(__file__).with_name("shim.c")
ACTIONS = ("never", "kill before", "kill after", "fail once", "fail from then on")
SERIOUS_S = 60  # a child that takes longer hangs
COSTS = {
    "seconds",
    "solver_seconds",
    "stages",
    "peak_memory_bytes",
    "read_bytes",
    "written_bytes",
    "processes",
}  # all that two equal runs may differ in


@dataclass(frozen=True)
class Call:
    """One call that touched the output."""

    kind: str  # create, open, write, truncate, fsync, close, mkdir, rmdir, unlink, rename, renameat2
    path: str
    second: str  # the new name of a rename


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int  # -9 when killed
    out: str
    err: str
    calls: list[Call] = field(repr=False)


class Server:
    """Forks a child for every command. Use as a context manager."""

    def __init__(self, directory: Path, warm_up: list[list[str]]) -> None:
        shim = directory / "shim.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl"], check=True)
        self._trace = directory / "trace"
        environment = os.environ | {
            "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({"warm_up": warm_up})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.communicate()

    def run(
        self,
        arguments: list[Any],
        watched: Path,
        action: str = "never",
        at: int = 0,
        error: int = 0,
        *,
        exchange: bool = True,
        killed_after_s: float | None = None,
    ) -> Ended:
        """Run one command; at the call number `at` that touches `watched` or anything in it, take the action.

        Args:
            arguments: of the command line.
            watched: the directory that outputs are made in.
            action: one of ACTIONS.
            at: from 0.
            error: the errno of a failure.
            exchange: whether two names can be exchanged in one step.
            killed_after_s: kill the child so long after its start.
        """
        self._trace.unlink(missing_ok=True)
        answer = self._ask(
            {
                "arguments": [str(argument) for argument in arguments],
                "arm": [str(watched), at, ACTIONS.index(action), error, str(self._trace), int(not exchange)],
                "killed_after_s": killed_after_s,
            }
        )
        lines = self._trace.read_text().splitlines() if self._trace.exists() else []
        return Ended(answer["code"], answer["out"], answer["err"], [Call(*line.split("\t")) for line in lines])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def content(directory: Path) -> dict[str, bytes] | None:
    """Every file, the report without what a run has cost; None if there is no such directory."""
    if not directory.exists():
        return None
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    if report := found.get("tsenor-report.json"):
        found["tsenor-report.json"] = json.dumps(_without_costs(json.loads(report))).encode()
    if page := found.get("tsenor-report.html"):  # made of the report, costs and all (tests/report/test_report.py)
        found["tsenor-report.html"] = page[-len(b"</html>") :]
    return found


def _without_costs(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {key: _without_costs(value) for key, value in facts.items() if key not in COSTS}
    return [_without_costs(value) for value in facts] if isinstance(facts, list) else facts


# --- the server -------------------------------------------------------------------------------------------------------


def _serve() -> None:
    from tsenor_cli.cli import run
    from tsenor_cli.report import page

    page.report_page = lambda *_: "<!doctype html></html>"  # drawn, it would take longer than everything else
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question = json.loads(line)
        for arguments in question.get("warm_up", []):
            assert run(arguments) == 0
        answer = _child(shim, question) if "arguments" in question else {}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _child(shim: ctypes.CDLL, question: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _run(shim, question, out.fileno(), err.fileno())
        code = _wait(child, question["killed_after_s"])
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read().decode(), "err": err.read().decode()}


def _run(shim: ctypes.CDLL, question: dict[str, Any], out: int, err: int) -> None:
    from tqdm import tqdm

    from tsenor_cli.cli import run

    code = 70
    try:
        # tqdm's own is a semaphore that all forks share: a child that is killed while it holds it stops all others.
        tqdm.set_lock(threading.RLock())
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w")
        start, *numbers, trace, exchange_refused = question["arm"]
        shim.shim_arm(start.encode(), ctypes.c_long(numbers[0]), *numbers[1:], trace.encode(), exchange_refused)
        code = run(question["arguments"])
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  (a traceback is what the tests look for)
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, killed_after_s: float | None) -> int:
    started = time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > (SERIOUS_S if killed_after_s is None else killed_after_s):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)


if __name__ == "__main__":
    _serve()
