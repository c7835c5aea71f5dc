"""The output is absent, the old one, or the new complete one; whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import read_shards
from filelock import FileLock

from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.writer import OutputShards, check_output, check_space, staged_output
from tsenor_cli.errors import OutputUnavailable, TsenorError


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_output_appears_at_the_end_and_only_then(tmp_path):
    output = tmp_path / "new" / "out"
    with staged_output(output) as staging:
        (staging / "a").write_text("1")
        assert not output.exists()
    assert files(output.parent) == ["out"]
    assert (output / "a").read_text() == "1"


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, exists):
    output = tmp_path / "place" / "out"
    if exists:
        output.mkdir(parents=True)
        (output / "old").write_text("0")
    with pytest.raises(ZeroDivisionError), staged_output(output) as staging:
        (staging / "a").write_text("1")
        raise ZeroDivisionError
    assert files(output.parent) == (["out"] if exists else [])
    assert not exists or files(output) == ["old"]


def test_the_old_output_is_replaced_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("0")
    with staged_output(output) as staging:
        (staging / "new").write_text("1")
    assert files(output) == ["new"]


def test_a_signal_between_the_two_renames_puts_the_old_output_back(tmp_path, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "old").write_text("0")

    def interrupted(path, target):
        if path.name.endswith("-partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_output(output) as staging:
        (staging / "new").write_text("1")
    assert files(tmp_path / "out") == ["old"]


def test_a_swap_that_stopped_half_way_is_undone_at_the_next_start(tmp_path):
    (tmp_path / "out.tsenor-old").mkdir()
    (tmp_path / "out.tsenor-partial").mkdir()
    with pytest.raises(ZeroDivisionError), staged_output(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out.tsenor-partial").exists()


def test_two_writers_on_one_output(tmp_path):
    lock = FileLock(tmp_path / "out.tsenor-lock")
    with lock, pytest.raises(OutputUnavailable, match="another run"), staged_output(tmp_path / "out"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_what_the_system_refuses_is_one_line(tmp_path, code):
    with pytest.raises(TsenorError) as caught, staged_output(tmp_path / "out"):
        raise OSError(code, "No luck", "/somewhere/model.safetensors")
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("/somewhere/model.safetensors: No luck")
    assert not (tmp_path / "out").exists()


def test_outputs_that_collide_with_the_input_are_refused(llama, tmp_path):
    (tmp_path / "link").symlink_to(llama)
    for output in (llama, llama / "inside", tmp_path, tmp_path / "link", llama / ".." / "llama"):
        with pytest.raises(OutputUnavailable, match="overlap"):
            check_output(output, llama, overwrite=True)


def test_overwrite_replaces_checkpoints_and_nothing_else(llama, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(llama, tmp_path / "old")
    for name in ("old", "empty", "absent"):
        check_output(tmp_path / name, llama, overwrite=True)
    with pytest.raises(OutputUnavailable, match="not a checkpoint"):
        check_output(tmp_path / "photos", llama, overwrite=True)
    with pytest.raises(OutputUnavailable, match="exists"):
        check_output(tmp_path / "old", llama, overwrite=False)


def test_too_little_space_is_noticed_before_the_start(tmp_path):
    with pytest.raises(TsenorError, match="GB free"):
        check_space(tmp_path / "a" / "b", 2**60)


def test_format_pt_is_always_written_and_nothing_else_changes(llama, tmp_path):
    """Some loaders crash on files without `format: pt`."""
    name = "model-00001-of-00004.safetensors"
    raw = (llama / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"note": "no format ☃"}
    text = json.dumps(header).encode()
    (llama / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    checkpoint = open_checkpoint(llama)
    (tmp_path / "staging").mkdir()
    shards = OutputShards(checkpoint, tmp_path / "staging")
    for tensor in reversed(checkpoint.tensors.values()):  # in any order
        with shards.place_of(tensor) as file:
            file.writelines(tensor.chunks())
    shards.sync()
    copy = read_shards(tmp_path / "staging")[name]
    assert {k: v.tolist() for k, v in copy.items()} == {k: v.tolist() for k, v in read_shards(llama)[name].items()}
    written = (tmp_path / "staging" / name).read_bytes()
    header_length = int.from_bytes(written[:8], "little")
    assert header_length % 8 == 0
    assert json.loads(written[8 : 8 + header_length])["__metadata__"] == {"note": "no format ☃", "format": "pt"}


@pytest.fixture
def in_a_mount(tmp_path):
    """Run a shell script with `options` for a tmpfs at $MOUNT, in namespaces of its own: real, and gone afterwards."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs user namespaces, which this machine does not allow")
    mount = tmp_path / "mount"
    mount.mkdir()

    def run(options, script):
        script = f"MOUNT={mount}; mount -t tmpfs -o {options} tmpfs $MOUNT && {script}"
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_a_disk_that_is_really_full(llama, in_a_mount):
    """Past the check beforehand, which another process can always overtake."""
    code = (
        "import sys, tsenor_cli.pipeline as p; p.check_space = lambda *_: None;"
        "from tsenor_cli.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    prune = f"{sys.executable} -c '{code}' prune {llama} --nm 2:4 -o $MOUNT/out"
    done = in_a_mount("size=120k", f"{prune}; code=$?; ls -A $MOUNT; exit $code")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_disk_that_is_really_read_only(llama, in_a_mount):
    done = in_a_mount("ro", f"{sys.executable} -m tsenor_cli prune {llama} --nm 2:4 -o $MOUNT/out")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1
