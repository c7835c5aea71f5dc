"""MODEL is a directory, or a hub id that goes through huggingface_hub's own cache."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels.compilation import VARIABLE, cache_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(pristine_llama, tmp_path):
    """A hub cache as huggingface_hub lays it out: snapshots of links into blobs."""
    repo = tmp_path / "hub" / "models--org--tiny-llama"
    snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"
    for path in sorted(pristine_llama.rglob("*")):
        if path.is_file():
            relative = path.relative_to(pristine_llama)
            blob = blobs / str(relative).replace("/", "-")
            blobs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / relative).symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_id_is_taken_from_the_cache_when_offline(hub_cache, tmp_path, offline):
    """A real process, because huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-m", "tsenor_cli", "prune", "org/tiny-llama@main", "--nm", "2:4", "-q"]
    environment = {"HF_HUB_CACHE": str(hub_cache), offline: "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    environment[VARIABLE] = str(cache_directory().parent)  # where our kernels are compiled already
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "tiny-llama-2of4-transposable\n"), done.stderr
    output = tmp_path / "tiny-llama-2of4-transposable"
    assert not any(path.is_symlink() for path in output.rglob("*"))
    card = (output / "README.md").read_text()
    assert "base_model: org/tiny-llama" in card
    assert f'"revision": "{COMMIT}"' in (output / "tsenor-report.json").read_text()


def test_an_id_that_is_not_cached_is_refused_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputRefused, match="not in the local cache"):
        resolve_checkpoint("org/nowhere")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_the_network_is_not_even_tried(monkeypatch, tmp_path, name):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: asked.update(options) or tmp_path)
    resolve_checkpoint("org/model")
    assert asked["local_files_only"] is False
    monkeypatch.setenv(name, "1")
    resolve_checkpoint("org/model@v1")
    assert asked["local_files_only"] is True
    assert asked["revision"] == "v1"


def test_a_full_disk_is_no_wrong_name(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        resolve_checkpoint("org/model")


@pytest.mark.parametrize("model", ["nowhere", "./a/b", "/no/such/place", "a/b/c", "../x", ""])
def test_what_is_no_directory_and_no_hub_id_is_refused(model):
    with pytest.raises(InputRefused, match="no such directory"):
        resolve_checkpoint(model)


def test_a_file_is_refused(llama):
    with pytest.raises(InputRefused, match="is a file"):
        resolve_checkpoint(str(llama / "config.json"))
