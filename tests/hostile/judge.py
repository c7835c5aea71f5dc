"""Runs mutants through the real command line, in one process, and judges every one.

    judge.py KIND FIRST COUNT [DIRECTORY]      prints one JSON object; exits 1 if a mutant was not taken well

A mutant may be refused: one line on stderr, exit code 3 or 4, nothing written. Or it is taken: then `verify` has to
accept what comes of it. Nothing else: no traceback, no other exit code, no more than 5 s, no more than 1 GiB, no file
touched outside of the output's place, no process started, no connection made, nothing unpickled. Nine in ten of those
that the reader of checkpoints refuses are given to it directly, for the command line does nothing before it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import count as numbers
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from hostile.mutants import MUTANTS
from safetensors import safe_open

LIMIT_S = 5.0
LIMIT_BYTES = 2**30
_PAGES = 50  # one page in so many is drawn
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}
_NEVER = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
}


class Watch:
    """Hears of every file that is opened and everything that is changed, from the moment it begins to."""

    def __init__(self, allowed: Path) -> None:
        self.begun = False
        self.seen: list[str] = []
        self._allowed = str(allowed)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.begun:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {arguments}")
        elif (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING) or event in _CHANGING:
            path = arguments[0]
            if isinstance(path, int):  # a file that is open already
                return
            place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
            relative = not Path(os.fsdecode(path)).is_absolute()  # shutil.rmtree works relative to open directories
            if not (place.startswith(self._allowed) or (relative and event in _CHANGING) or "__pycache__" in place):
                self.seen.append(f"{event} {place}")


class Judge:
    """Mutants of one kind."""

    def __init__(self, kind: str, directory: Path) -> None:
        self._model, self._output = directory / "model", directory / "place" / "out"
        _make_checkpoint(self._model)
        self._output.parent.mkdir()
        (self._model / "evil.py").write_text("import os; os.mkdir('/evil')")
        name, self._mutate = MUTANTS[kind]
        self._file = self._model / name
        self._whole = self._file.read_bytes()
        self._watch = Watch(self._output.parent)
        for code in (self._run("prune", self._model, "--nm", "2:4", "-q", "-o", self._output), self._verify()):
            assert code == (0, ""), code  # and everything is imported and compiled
        self._sweep()

    def judge(self, number: int) -> str:
        """Raises AssertionError for a mutant that is not taken well; else says what became of it."""
        self._file.write_bytes(self._mutate(self._whole, number))
        self._watch.begun, self._watch.seen = True, []
        try:
            with _alarm():
                if number % 10 and (refused := self._refused_by_the_reader()):
                    assert not self._watch.seen, self._watch.seen
                    return _reason(refused)
                code, err = self._run("prune", self._model, "--nm", "2:4", "-q", "-o", self._output)
            assert not self._watch.seen, self._watch.seen
            if code:
                assert code in {3, 4}, (code, err)
                assert err.startswith("tsenor: error: "), err
                assert err.count("\n") == 1, err
                assert not any(self._output.parent.iterdir()), "something was left lying about"
                return _reason(err)
            assert not err, err
            for path in (*self._model.glob("*.safetensors"), *self._output.glob("*.safetensors")):
                with safe_open(path, "pt") as file:  # the format's own library refuses holes, overlaps and remains
                    assert file.keys()
            checked = self._verify()
            assert checked == (0, ""), checked
            assert not self._watch.seen, self._watch.seen
            return "taken, and verified"
        finally:
            self._watch.begun = False
            self._sweep()

    def _refused_by_the_reader(self) -> str | None:
        from tsenor_cli.checkpoint.reader import open_checkpoint
        from tsenor_cli.errors import InputRefused

        try:
            open_checkpoint(self._model)
        except InputRefused as refused:
            return str(refused)
        return None

    def _verify(self) -> tuple[int, str]:
        with _alarm():
            return self._run("verify", self._output, "--against", self._model, "-q")

    def _run(self, *arguments: Any) -> tuple[int, str]:
        from tsenor_cli.cli import run

        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = run([str(argument) for argument in arguments])
            except Exception as bug:  # a user would see the traceback
                raise AssertionError(traceback.format_exc()) from bug
        return code, err.getvalue()

    def _sweep(self) -> None:
        for path in self._output.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make_checkpoint(directory: Path) -> None:
    """As small as a Llama can be: two shards, one layer."""
    from checkpoints import write_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names = sorted(tensors)
    shards = {
        f"model-0000{n}-of-00002.safetensors": {name: tensors[name] for name in names[n - 1 :: 2]} for n in (1, 2)
    }
    write_checkpoint(directory, shards, config.to_dict())


def _reason(line: str) -> str:
    """What was refused, without names and numbers: to count by."""
    words = (
        "not valid JSON", "not a JSON object", "not a whole", "is not valid", "overlap", "cut short", "bytes after",
        "metadata", "cannot build", "no model", "is not in", "missing", "names", "weight_map", "NaN", "quantised",
        "packed", "nothing to prune", "code from elsewhere", "larger than",
    )  # fmt: skip
    return next((f"refused: {word}" for word in words if word in line), "refused: something else")


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak_bytes() -> int:
    """The most that this process has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _draw_few_pages() -> None:
    """Of runs that go well: to draw a page takes longer than all the rest."""
    from tsenor_cli.report import page

    draw, turn = page.report_page, numbers()
    page.report_page = lambda report: draw(report) if next(turn) % _PAGES == 0 else "<!doctype html></html>"


def judge_range(kind: str, first: int, count: int, memory: Path | None) -> dict[str, Any]:
    """Judge `count` mutants; what became of them, and what was wrong."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        judge = Judge(kind, Path(directory))
        _draw_few_pages()
        for number in range(first, first + count):
            started = time.monotonic()
            try:
                found[judge.judge(number)] += 1
            except Exception as fault:  # noqa: BLE001  (whatever it is, the next one is to be judged)
                wrong.append(f"{kind} {number}: {type(fault).__name__} {fault}")
            slowest = max(slowest, time.monotonic() - started)
    if peak_bytes() > LIMIT_BYTES:
        wrong.append(f"{kind} {first} to {first + count}: {peak_bytes() / 2**20:.0f} MiB")
    return {"found": found, "wrong": wrong, "slowest_s": slowest, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    result = judge_range(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(bool(result["wrong"]))
