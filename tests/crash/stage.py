"""Runs that are disturbed, and the judges of what is left: the old output or the new one, and nothing lost."""

from __future__ import annotations

import errno
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import add_tokenizer, make_checkpoint
from crash.harness import Ended, Server, content

SILENT = {"close", "open", "unlink", "rmdir", "mkdir"}  # sweeping up, and making what is there: nothing is lost


@dataclass
class Scene:
    """A command, what is there before it, and what has to be there after it."""

    name: str
    arguments: list[Any]
    directory: Path  # where the output is made
    before: Path | None = None  # what lies at the output's place
    partial: Path | None = None  # what an interrupted run has left
    exchange: bool = True
    wanted: dict[str, bytes] = field(default_factory=dict, repr=False)
    calls: int = 0
    seconds: float = 0

    @property
    def output(self) -> Path:
        return self.directory / "out"

    def set(self) -> None:
        """Put everything in its place."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, self.output)
        if self.partial is not None:
            shutil.copytree(self.partial, self.directory / "out.tsenor-partial")

    def run(self, server: Server, *more: str, **disturbance: Any) -> Ended:
        return server.run(
            [*self.arguments, "-o", self.output, *more], self.directory, exchange=self.exchange, **disturbance
        )

    @property
    def old(self) -> dict[str, bytes] | None:
        return content(self.before) if self.before is not None else None


class Stage:
    """A checkpoint, a text, and scenes: with and without calibration, new, over an old output, and resumed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.model = add_tokenizer(make_checkpoint("llama", directory / "model"))
        self.text = directory / "text.txt"
        letters = random.Random(0)
        self.text.write_text(" ".join("".join(letters.choices("abcdefgh ijklmnop,.", k=7)) for _ in range(400)))
        free = ["prune", self.model, "--nm", "2:4", "--quiet"]
        calibration = ["--calibration", self.text, "--samples", "4", "--sequence-length", "16"]
        calibrated = [*free, "--save-masks", "--method", "sparsegpt", "--memory-budget", "1GiB", *calibration]
        self._commands = {"data-free": free, "calibrated": calibrated}
        self._warm = {name: directory / f"warm-up, {name}" for name in self._commands}
        warm_up = [[*map(str, line), "-o", str(self._warm[name])] for name, line in self._commands.items()]
        self.server = Server(directory, warm_up)

    def scenes(self) -> list[Scene]:
        """All of them, with what each has to give."""
        found = []
        for name, arguments in self._commands.items():
            place = self._directory / "place"
            over = [*arguments, "--overwrite"]
            old = next(output for other, output in self._warm.items() if other != name)
            new = Scene(f"{name}, new", arguments, place)
            found += [
                new,
                Scene(f"{name}, over an old output", over, place, old),
                Scene(f"{name}, over an old output without exchange", over, place, old, exchange=False),
                Scene(f"{name}, resumed over an old output", [*over, "--resume"], place, old, self._half(new, name)),
            ]
        for scene in found:
            scene.set()
            started = time.monotonic()
            done = scene.run(self.server)
            scene.seconds = time.monotonic() - started
            assert done.code == 0, done.err
            scene.calls = len(done.calls)
            wanted = content(scene.output)
            assert wanted is not None
            scene.wanted = wanted
            checked = self.server.run(["verify", scene.output, "--against", self.model], scene.directory)
            assert checked.code == 0, checked.err
        return found

    def _half(self, scene: Scene, name: str) -> Path:
        """What a run leaves that is killed in the middle."""
        scene.set()
        calls = len(scene.run(self.server).calls)
        scene.set()
        assert scene.run(self.server, action="kill before", at=calls // 2).code == -9
        return Path(shutil.copytree(scene.directory / "out.tsenor-partial", self._directory / f"half-{name}"))


def judge_kill(server: Server, scene: Scene, at: int, action: str) -> bool:
    """Kill at one call; the output is the old or the new one; then resume. Threads may make fewer calls than before."""
    scene.set()
    ended = scene.run(server, action=action, at=at)
    assert ended.code in {0, -9}, ended
    _judge_rest(server, scene)
    return ended.code == -9


def judge_time(server: Server, scene: Scene, seconds: float) -> bool:
    """Kill after a time; whether it came before the end."""
    scene.set()
    ended = scene.run(server, killed_after_s=seconds)
    assert ended.code in {0, -9}, ended
    _judge_rest(server, scene)
    return ended.code == -9


def judge_failure(server: Server, scene: Scene, at: int, action: str, code: int) -> Ended:
    """Let calls fail; one line says so, and the old output is there, or the new one; then go on without failures."""
    scene.set()
    ended = scene.run(server, action=action, at=at, error=code)
    found = content(scene.output)
    if ended.code == 0:
        assert ended.calls[at].kind in SILENT, f"nobody noticed: {ended.calls[at]}"
        assert found == scene.wanted
    else:
        assert ended.code == 1, ended
        assert ended.out == ""
        assert ended.err.startswith("tsenor: error: ")
        assert ended.err.count("\n") == 1, ended.err
        complete, aside = "complete all the same" in ended.err, "the next run puts it back" in ended.err
        assert not (aside and scene.exchange)
        assert found == (scene.wanted if complete else None if aside else scene.old), ended
    _judge_rest(server, scene)
    return ended


def _judge_rest(server: Server, scene: Scene) -> None:
    """What is left is whole, and with --resume it becomes what an undisturbed run gives."""
    found = content(scene.output)
    absent_for_an_instant = found is None and not scene.exchange
    assert found in (scene.old, scene.wanted) or absent_for_an_instant, "neither the old output nor the new one"
    again = scene.run(server, "--resume")
    assert (again.code, again.out, again.err) == (0, f"{scene.output}\n", ""), again
    assert content(scene.output) == scene.wanted
    assert [path.name for path in scene.directory.iterdir()] == ["out"], "something was left lying about"


FAILURES = (  # what, from which call on, for which calls
    ("fail once", errno.EIO),
    ("fail from then on", errno.ENOSPC),
    ("fail from then on", errno.EROFS),
)
