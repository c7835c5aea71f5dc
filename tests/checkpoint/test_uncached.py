"""Reading past the system's cache gives the same bytes, and leaves the cache as it is."""

from __future__ import annotations

import os
import random
import sys
import time

import pytest
import torch

from tsenor_cli.checkpoint import reader
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.uncached import _is_cached, read_uncached
from tsenor_cli.errors import InputRefused
from tsenor_cli.pipeline import prune, verify
from tsenor_cli.specs import NMPattern, PruneSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems read through their caches")


def is_cached(path):
    """To be asked once: what is not, the system begins to read."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def make_file(path):
    """On disk, and not in the cache."""
    path.write_bytes(random.Random(0).randbytes(50_001))
    return forget(path)


def forget(path):
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        pages = range(0, path.stat().st_size, 4096)
        for _ in range(100):  # a busy system may keep a page for a moment
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(_is_cached(opened.fileno(), page, 1) for page in pages):
                break
            time.sleep(0.01)
    return path


@pytest.fixture
def file(tmp_path):
    if is_cached(make_file(tmp_path / "probe")) or read_uncached(make_file(tmp_path / "other"), 0, 1) is None:
        pytest.skip("this file system is in memory, or has no other way")
    return make_file(tmp_path / "file")


@pytest.mark.parametrize(
    ("start", "nbytes"), [(0, 1), (0, 4096), (8, 4096), (4088, 16), (4096, 8192), (104, 33_333), (48, 49_953)]
)
def test_the_same_bytes(file, start, nbytes):
    for _ in range(10):  # to ask whether a page is there may have made the system begin to read it
        found = read_uncached(forget(file), start, nbytes)
        if not is_cached(file):
            break
    else:
        pytest.fail("it has gone through the cache every time")
    assert found == file.read_bytes()[start : start + nbytes]
    assert torch.frombuffer(found, dtype=torch.uint8).data_ptr() % 8 == 0


def test_what_is_in_the_cache_is_not_fetched_from_the_disk(file):
    file.read_bytes()
    assert read_uncached(file, 8, 40_000) is None
    forget(file)
    assert read_uncached(file, 8, 40_000) is not None


def test_of_a_file_that_is_not_ours_the_system_does_not_say_what_is_in_the_cache(file, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    file.read_bytes()
    assert read_uncached(file, 8, 40_000) is not None


def test_what_is_left_to_the_plain_way(file, tmp_path):
    assert read_uncached(file, 4, 16) is None  # a float64 could not lie there
    assert read_uncached(file, 49_992, 10) is None  # beyond the end
    assert read_uncached(tmp_path / "none", 0, 8) is None


@pytest.fixture
def no_room(monkeypatch):
    """For any checkpoint in the system's cache."""
    monkeypatch.setattr(reader, "_outgrow_cache", lambda _: True)


@pytest.mark.usefixtures("no_room")
def test_a_checkpoint(llama, tmp_path, monkeypatch):
    read = []

    def counted(path, *part):
        read.append(path.name)
        return read_uncached(path, *part)

    for path in llama.glob("*.safetensors"):
        forget(path)
    prune(PruneSpec(llama, tmp_path / "uncached", NMPattern(2, 4)))
    monkeypatch.setattr("tsenor_cli.checkpoint.shard.read_uncached", counted)
    assert verify(str(tmp_path / "uncached"), against=str(llama)).ok
    assert set(read) == {path.name for path in llama.glob("*.safetensors")}
    monkeypatch.setattr(reader, "_outgrow_cache", lambda _: False)
    prune(PruneSpec(llama, tmp_path / "plain", NMPattern(2, 4)))
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "uncached" / path.name).read_bytes()


@pytest.mark.usefixtures("no_room")
def test_a_file_that_becomes_shorter_is_named(llama):
    tensor = open_checkpoint(llama).tensors["model.norm.weight"]
    os.truncate(tensor.path, tensor.stop - 1)
    with pytest.raises(InputRefused, match="shorter"):
        tensor.read()


def test_what_outgrows_the_cache(llama, monkeypatch):
    pages = open_checkpoint(llama).nbytes * 2 // 4096
    for memory, uncached in ((pages - 1, True), (pages + 1, False)):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory}.__getitem__)
        assert {tensor.uncached for tensor in open_checkpoint(llama).tensors.values()} == {uncached}
