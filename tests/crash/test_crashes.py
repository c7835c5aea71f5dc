"""Killed, or refused by the system, at calls all over a run: see scripts/campaign_crashes for every one of them."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from crash.stage import FAILURES, Stage, judge_failure, judge_kill, judge_time

pytestmark = pytest.mark.slow

SCENES = [
    f"{method}, {what}"
    for method in ("data-free", "calibrated")
    for what in ("new", "over an old output", "over an old output without exchange", "resumed over an old output")
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """In memory where that is possible: thousands of calls to fsync."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("crash")
    made = Stage(directory)
    with made.server:
        yield made
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def scenes(stage):
    return {scene.name: scene for scene in stage.scenes()}


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_calls_that_touch_the_output(stage, scenes, name):
    """Fourteen places in each of eight scenes, every other time within or right after the call."""
    scene = scenes[name]
    first = random.Random(name).randrange(scene.calls // 14)
    killed = [
        judge_kill(stage.server, scene, at, ("kill before", "kill after")[place % 2])
        for place, at in enumerate(range(first, scene.calls, scene.calls // 14))
    ]
    assert sum(killed) > 12


@pytest.mark.parametrize("name", SCENES)
def test_killed_around_the_switch(stage, scenes, name):
    scene = scenes[name]
    scene.set()
    calls = scene.run(stage.server).calls
    (switch,) = (at for at, call in enumerate(calls) if call.kind == ("renameat2" if scene.before else "rename"))
    for at in range(switch - 1, switch + 4):
        assert judge_kill(stage.server, scene, at, "kill before")


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_random_times(stage, scenes, name):
    scene, times, killed = scenes[name], random.Random(name), 0
    while killed < 3:  # a run may have ended by then
        killed += judge_time(stage.server, scene, times.uniform(0, scene.seconds))


@pytest.mark.parametrize(("action", "code"), FAILURES)
@pytest.mark.parametrize("name", SCENES)
def test_refused_by_the_system(stage, scenes, name, action, code):
    scene = scenes[name]
    scene.set()
    calls = scene.run(stage.server).calls
    places = [at for at, call in enumerate(calls) if call.kind not in {"close", "open"}]
    for at in random.Random(f"{name} {code}").sample(places, 4):
        judge_failure(stage.server, scene, at, action, code)


@pytest.mark.parametrize("name", SCENES)
def test_everything_is_on_the_disk_before_the_switch(stage, scenes, name):
    """From the calls themselves: after a power cut nothing can be missing that the new name promises."""
    scene = scenes[name]
    scene.set()
    staged = f"{scene.output}.tsenor-partial/checkpoint"
    dirty, switched = set(), False
    for call in scene.run(stage.server).calls:
        if call.kind in {"create", "write", "truncate"} and call.path.startswith(staged):
            assert not switched
            dirty.add(call.path)
        if call.kind in {"create", "mkdir", "rename"} and call.path.startswith(staged):
            dirty.add(os.path.dirname(call.path))  # noqa: PTH120
        if call.kind == "fsync":
            dirty.discard(call.path)
        if call.kind in {"rename", "renameat2"} and call.second == str(scene.output):
            switched, dirty = True, {path for path in dirty if path.startswith(staged)}
            assert dirty == {staged} & {None} or not dirty, dirty
            dirty = {str(scene.directory)}
    assert switched
    assert not dirty, "the switch itself was never synced"
