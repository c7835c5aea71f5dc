"""Compiled kernels outlive the process, in a directory that only we can write to."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import pytest

from tsenor_cli.kernels import compilation

SOLVE = """
import json, sys, torch
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.kernels.compilation import cache_directory
solution = solve_mask(torch.arange(1024.0).reshape(32, 32).sin().abs(), sys.argv[1])
print(json.dumps([str(cache_directory()), solution.objective]))
"""


def start(cache, pattern="2:4"):
    environment = os.environ | {compilation.VARIABLE: str(cache)}
    command = [sys.executable, "-W", "error", "-c", SOLVE, pattern]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not errors
    return json.loads(output)


def files(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.nb?")}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that two processes have filled at the same time, with different patterns."""
    cache = tmp_path_factory.mktemp("cache") / "new" / "tsenor"
    first, second = start(cache), start(cache, "4:8")
    finish(first)
    finish(second)
    return cache


def test_other_sources_have_another_directory(monkeypatch):
    before, read = compilation._fingerprint(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "lanes.py" else b""))
    assert compilation._fingerprint() != before


def test_threads_decorate_one_after_the_other():
    """The place of the cache is a setting of all numba, and one thread must not put back what another has set."""
    before, entered = numba.config.CACHE_DIR, []

    def decorate():
        with compilation._caching_here():
            entered.append(numba.config.CACHE_DIR)

    with compilation._caching_here():
        other = threading.Thread(target=decorate)
        other.start()
        other.join(0.2)
        assert not entered
    other.join()
    assert entered == [str(compilation.cache_directory())]
    assert before == numba.config.CACHE_DIR


@pytest.mark.slow
def test_a_second_process_compiles_nothing(filled):
    before = files(filled)
    assert len(before) > 20
    for pattern in ("2:4", "4:8"):
        directory, _ = finish(start(filled, pattern))
        assert Path(directory).parent == filled
    assert files(filled) == before


@pytest.mark.slow
def test_a_new_pattern_compiles_only_its_dual_passes(filled):
    before = set(files(filled))
    finish(start(filled, "3:8"))
    assert {path.name.split(".")[0] for path in set(files(filled)) - before} == {"passes"}


@pytest.mark.slow
def test_the_directory_is_private(filled):
    for directory in (filled, *filled.glob("kernels-*")):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """cache_directory as a new process would see it, with the cache at tmp_path / "cache"."""
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "cache"))
    return compilation.cache_directory.__wrapped__


def is_fallback(directory, tmp_path):
    return tmp_path not in directory.parents and directory.stat().st_mode & 0o777 == 0o700


def test_the_named_directory_is_used(fresh, tmp_path):
    assert fresh().parent == tmp_path / "cache"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777])
def test_a_directory_that_others_can_write_is_not_trusted(fresh, tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    assert is_fallback(fresh(), tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_neither_is_a_directory_inside(fresh, tmp_path):
    inside = fresh()
    inside.chmod(0o777)
    assert is_fallback(fresh(), tmp_path)


def test_somebody_elses_directory_is_not_trusted(fresh, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "cache").stat().st_uid + 1)
    assert is_fallback(fresh(), tmp_path)


def test_a_link_is_not_trusted(fresh, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert is_fallback(fresh(), tmp_path)


def test_a_directory_that_cannot_be_written_is_replaced(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "file" / "cache"))
    assert is_fallback(fresh(), tmp_path)
    if os.geteuid() != 0:  # permissions do not bind root
        monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "cache"))
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o500)
        assert is_fallback(fresh(), tmp_path)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation._base_directory() == tmp_path / "tsenor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation._base_directory() == tmp_path / ".cache" / "tsenor"
