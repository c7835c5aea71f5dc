#!/usr/bin/env python3
"""Disturb `tsenor prune` in every way at every call that touches the output, and judge what is left.

    scripts/campaign_crashes.py [--times 500] [--every 1] [--scene TEXT]

Eight scenes (with and without calibration; a new output, over an old one, the same where names cannot be exchanged, and
a resumed run). In each: SIGKILL before every call, and half-way through every write; EIO once at every call that can
fail; ENOSPC and EROFS from every such call on; SIGKILL at random times. The output must be the old one or the new one,
complete, and --resume must give the bytes of an undisturbed run, which verify has checked. Exits 1 if anything else is
found. An hour on one core. The tests of tests/crash do a few of each.
"""

from __future__ import annotations

import argparse
import errno
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from crash.stage import FAILURES, Scene, Stage, judge_failure, judge_kill, judge_time

MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=500, help="kills at random times, of all scenes together [500]")
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth call only [1]")
    parser.add_argument("--scene", default="", help="only the scenes whose name has this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        stage = Stage(Path(directory))
        with stage.server:
            scenes = [scene for scene in stage.scenes() if arguments.scene in scene.name]
            wrong = [fault for scene in scenes for fault in campaign(stage, scene, arguments.every)]
            wrong += random_times(stage, scenes, arguments.times)
    print(f"{len(wrong)} faults")
    sys.exit(bool(wrong))


def campaign(stage: Stage, scene: Scene, every: int) -> list[str]:
    """Every disturbance at every call of one scene."""
    started = time.monotonic()
    scene.set()
    kinds = [call.kind for call in scene.run(stage.server).calls]
    everywhere = list(range(0, len(kinds), every))
    writes = [at for at in everywhere if kinds[at] == "write"]
    failing = [at for at in everywhere if kinds[at] not in {"open", "close"}]
    wrong = judged(scene, "killed before", everywhere, lambda at: judge_kill(stage.server, scene, at, "kill before"))
    wrong += judged(scene, "killed half-way", writes, lambda at: judge_kill(stage.server, scene, at, "kill after"))
    for action, code in FAILURES:
        what = f"{action} with {errno.errorcode[code]}"
        judge = partial(judge_failure, stage.server, scene, action=action, code=code)
        wrong += judged(scene, what, failing, judge)
    kills, failures = len(everywhere) + len(writes), len(FAILURES) * len(failing)
    print(f"{scene.name}: {kills} kills, {failures} failures, {len(wrong)} faults, ", end="")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return wrong


def judged(scene: Scene, what: str, places: list[int], judge: Callable[[int], object]) -> list[str]:
    """The faults that a judge finds."""
    wrong = []
    for at in places:
        try:
            judge(at)
        except AssertionError as fault:
            wrong.append(f"{scene.name}, {what}, call {at}: {fault}")
            print(wrong[-1], flush=True)
    return wrong


def random_times(stage: Stage, scenes: list[Scene], count: int) -> list[str]:
    """Kills at random times, the scenes in turn."""
    times, killed, wrong = random.Random(0), 0, []
    while killed < count:
        scene = scenes[killed % len(scenes)]
        seconds = times.uniform(0, scene.seconds)
        try:
            killed += judge_time(stage.server, scene, seconds)
        except AssertionError as fault:
            killed += 1
            wrong.append(f"{scene.name}, killed after {seconds:.3f} s: {fault}")
            print(wrong[-1], flush=True)
    print(f"{killed} kills at random times, {len(wrong)} faults", flush=True)
    return wrong


if __name__ == "__main__":
    main()
