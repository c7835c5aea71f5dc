"""The output is absent, the old one, or the new complete one; an interrupted run leaves what it needs to go on."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tsenor_cli.checkpoint import staging
from tsenor_cli.checkpoint.staging import check_output, check_space, identity_sha256, staged_output
from tsenor_cli.errors import InputRefused, OutputUnavailable, TsenorError

IDENTITY = {"--nm": "2:4"}
RESUME = "the same command with --resume goes on where this one stopped"


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def staged(output, identity=IDENTITY, *, overwrite=True, resume=None):
    return staged_output(output, identity, overwrite=overwrite, resume=resume)


def finish(staged, identity=IDENTITY):
    """The report is what says that an output is complete, and whose it is."""
    (staged.directory / "tsenor-report.json").write_text(f'{{"identity": "{identity_sha256(identity)}"}}')


def interrupt(output, identity=IDENTITY, error=KeyboardInterrupt, **options):
    """A run that finishes one tensor and then fails."""
    with pytest.raises(error) as caught, staged(output, identity, **options) as run:
        (run.directory / "half").write_text("1")
        run.journal.note("tensor", {"name": "a"})
        raise error
    return caught.value


@pytest.fixture
def place(tmp_path):
    """Where outputs go: empty."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def old(place):
    """An output that is there already."""
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text("0")
    return place / "out"


def test_the_output_appears_at_the_end_and_only_then(place):
    output = place / "new" / "out"
    with staged(output) as run:
        (run.directory / "a").write_text("1")
        assert not output.exists()
    assert files(output.parent) == ["out"]
    assert files(output) == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_output_is_replaced_whole(old, monkeypatch, exchange):
    if not exchange:  # as where the file system cannot
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    with staged(old) as run:
        (run.directory / "new").write_text("1")
        assert files(old) == ["config.json"]
    assert files(old) == ["new"]
    assert files(old.parent) == ["out"]


def test_names_are_exchanged_in_one_step_or_not_at_all(place):
    (place / "a").mkdir()
    (place / "b").mkdir()
    (place / "a" / "1").touch()
    assert staging._exchange(place / "a", place / "b")
    assert (files(place / "a"), files(place / "b")) == ([], ["1"])
    with pytest.raises(FileNotFoundError):
        staging._exchange(place / "a", place / "c")


def test_a_failure_before_anything_is_finished_leaves_nothing(old):
    with pytest.raises(ZeroDivisionError) as caught, staged(old):
        raise ZeroDivisionError
    assert files(old.parent) == ["out"]
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_later_leaves_what_it_needs_to_go_on_and_says_so(old, error):
    assert interrupt(old, error=error).__notes__ == [RESUME]
    assert files(old.parent) == ["out", "out.tsenor-partial"]
    assert files(old) == ["config.json"]


def test_what_would_fail_again_is_not_kept(old):
    with pytest.raises(InputRefused), staged(old) as run:
        run.journal.note("tensor", {"name": "a"})
        raise InputRefused("damaged", "fetch it again")
    assert files(old.parent) == ["out"]


def test_the_same_run_goes_on(place):
    interrupt(place / "out")
    with staged(place / "out", resume=True) as run:
        assert files(run.directory) == ["half"]
        assert run.journal.notes("tensor") == [{"name": "a"}]
    assert files(place) == ["out"]


def test_an_interrupted_run_is_not_thrown_away_unasked(place):
    interrupt(place / "out")
    with pytest.raises(
        OutputUnavailable, match="unfinished: repeat that run with --resume to go on, or with --no-resume"
    ):
        staged(place / "out").__enter__()
    with staged(place / "out", resume=False) as run:
        assert files(run.directory) == []
        assert len(run.journal) == 0


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"--nm": "4:8"}, "--nm was 2:4 and is 4:8: make it what it was, or start over with --no-resume"),
        ({}, "--nm was 2:4 and is gone"),
        ({"--nm": "1:4", "torch": "3"}, r"--nm was 2:4 and is 1:4 \(and 1 more\)"),
        ({"--nm": "2:4", "torch": "3"}, "torch was not there and is 3"),
    ],
)
def test_another_run_does_not_go_on(place, now, said):
    interrupt(place / "out")
    with pytest.raises(OutputUnavailable, match=said):
        staged(place / "out", now, resume=True).__enter__()
    with staged(place / "out", resume=True) as run:
        assert len(run.journal) == 1, "the refusal has cost something"


def test_a_switch_that_stopped_half_way_is_undone_at_the_next_start(old):
    """Only where two names cannot be exchanged at once is there such an instant."""
    interrupt(old)
    old.rename(old.parent / "out.tsenor-partial" / "old")
    with pytest.raises(OutputUnavailable, match="--resume"):
        staged(old).__enter__()
    assert files(old) == ["config.json"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_signal_before_the_switch(old, monkeypatch, exchange):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught, staged(old) as run:
        patch.setattr(staging, "_switch", raises(KeyboardInterrupt))
        run.journal.note("tensor", {"name": "a"})
        finish(run)
    assert caught.value.__notes__ == [RESUME]
    assert files(old) == ["config.json"]
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    with staged(old, resume=True):
        pass
    assert files(old) == ["tsenor-report.json"]
    assert files(old.parent) == ["out"]


def test_a_signal_after_the_switch(old, monkeypatch):
    monkeypatch.setattr(staging, "_sync_directories", lambda _: None)
    monkeypatch.setattr(staging, "_sync_directory", raises(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as caught, staged(old) as run:
        run.journal.note("tensor", {"name": "a"})
        finish(run)
    assert caught.value.__notes__ == ["the output is complete all the same"]
    assert files(old) == ["tsenor-report.json"]
    assert files(old.parent) == ["out"]


def raises(error):
    def function(*_):
        raise error

    return function


def test_a_signal_between_the_two_renames_puts_the_old_output_back(old, monkeypatch):
    rename = Path.rename

    def interrupted(path, target):
        if path.name == "checkpoint":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(old) as run:
        (run.directory / "new").write_text("1")
    assert files(old) == ["config.json"]


def test_what_led_to_the_output_that_is_there_is_swept(old):
    """Killed after the switch: what lies in the staging directory is the old output, and nobody goes on with that."""
    interrupt(old)
    (old / "tsenor-report.json").write_text(f'{{"identity": "{identity_sha256(IDENTITY)}"}}')
    with staged(old, resume=True) as run:
        assert len(run.journal) == 0
        assert files(run.directory) == []


def test_two_writers_on_one_output(place):
    lock = FileLock(place / "out.tsenor-lock")
    with lock, pytest.raises(OutputUnavailable, match="another run"), staged(place / "out"):
        pass


def test_an_output_that_appeared_meanwhile(old):
    with pytest.raises(OutputUnavailable, match="exists"), staged(old, overwrite=False):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_what_the_system_refuses_is_one_line(place, code):
    with pytest.raises(TsenorError) as caught, staged(place / "out") as run:
        run.journal.note("tensor", {"name": "a"})
        raise OSError(code, "No luck", "/somewhere/model.safetensors")
    assert caught.value.exit_code == 1
    assert caught.value.code == ("disk-full" if code in {errno.ENOSPC, errno.EDQUOT} else "failed")
    assert str(caught.value).startswith("/somewhere/model.safetensors: No luck")
    assert caught.value.__notes__ == [RESUME]
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_out_of_memory_is_one_line(place, error):
    with pytest.raises(TsenorError, match=r"out of memory: .*--memory-budget"), staged(place / "out"):
        raise error


def test_other_errors_are_bugs(place):
    with pytest.raises(RuntimeError, match="shapes"), staged(place / "out"):
        raise RuntimeError("shapes do not match")


def test_a_file_that_may_not_grow(place):
    with pytest.raises(TsenorError, match="No luck: raise ulimit -f"), staged(place / "out"):
        raise OSError(errno.EFBIG, "No luck")


def test_outputs_that_collide_with_the_input_are_refused(llama, tmp_path):
    (tmp_path / "link").symlink_to(llama)
    for output in (llama, llama / "inside", tmp_path, tmp_path / "link", llama / ".." / "llama"):
        with pytest.raises(OutputUnavailable, match="overlap"):
            check_output(output, llama, overwrite=True)


def test_overwrite_replaces_outputs_and_nothing_else(llama, place, monkeypatch):
    (place / "photos").mkdir()
    (place / "photos" / "config.json").write_text("{}")  # many a program has one
    (place / "empty").mkdir()
    (place / "link").symlink_to(place / "empty")
    shutil.copytree(llama, place / "old")
    (place / "old" / "tsenor-report.json").write_text("{}")
    for name in ("old", "empty", "absent"):
        check_output(place / name, llama, overwrite=True)
    for output, why in ((place / "photos", "not made by tsenor"), (place / "link", "not a directory")):
        with pytest.raises(OutputUnavailable, match=why):
            check_output(output, llama, overwrite=True)
    with pytest.raises(OutputUnavailable, match="exists"):
        check_output(place / "old", llama, overwrite=False)
    (place / "empty" / "inside").mkdir()
    monkeypatch.chdir(place / "empty" / "inside")
    for output in (Path(), Path("..")):
        with pytest.raises(OutputUnavailable, match="where you are"):
            check_output(output, llama, overwrite=True)


def test_a_mount_point_is_refused(llama):
    """It cannot be renamed, as everything else beside it that is finished."""
    with pytest.raises(OutputUnavailable, match="a mount point"):
        check_output(Path("/proc"), llama, overwrite=True)


def test_too_little_space_is_noticed_before_the_start(place):
    with pytest.raises(TsenorError, match="bytes free"):
        check_space(place / "a" / "b", 2**60)


def test_what_an_interrupted_run_has_written_needs_no_space_again(place, monkeypatch):
    free = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    (place / "out.tsenor-partial").mkdir()
    (place / "out.tsenor-partial" / "a").write_bytes(b"x" * 10_000)
    check_space(place / "out", 8000)
    with pytest.raises(TsenorError, match="bytes free"):
        check_space(place / "out", 80_000)


@pytest.fixture
def in_a_mount(place):
    """Run a shell script with `options` for a tmpfs at $MOUNT, in namespaces of its own: real, and gone afterwards."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs user namespaces, which this machine does not allow")
    mount = place / "mount"
    mount.mkdir()

    def run(options, script):
        script = f"MOUNT={mount}; mount -t tmpfs -o {options} tmpfs $MOUNT && {script}"
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_a_disk_that_is_really_full(llama, in_a_mount):
    """Past the check beforehand, which another process can always overtake. With more space the run goes on."""
    code = (
        "import sys, tsenor_cli.job as j; j.check_space = lambda *_: None;"
        "from tsenor_cli.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    prune = f"{sys.executable} -c '{code}' prune {llama} --nm 2:4 -o $MOUNT/out"
    again = f"mount -o remount,size=10m $MOUNT; {prune} --resume >/dev/null; echo $?; ls -A $MOUNT"
    done = in_a_mount("size=150k", f"{prune}; echo $?; ls -A $MOUNT; {again}")
    assert done.stdout.split() == ["1", "out.tsenor-partial", "0", "out"], done.stderr
    first = done.stderr.splitlines()[0]
    assert "No space left on device" in first
    assert first.endswith(f"{RESUME} [disk-full]")


@pytest.mark.slow
def test_a_disk_that_is_really_read_only(llama, in_a_mount):
    done = in_a_mount("ro", f"{sys.executable} -m tsenor_cli prune {llama} --nm 2:4 -o $MOUNT/out")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1
