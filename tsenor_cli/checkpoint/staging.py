"""The output is built in a directory beside its place and made visible by one switch of names (decision 0015).

    OUTPUT.tsenor-partial/checkpoint   becomes the output
    OUTPUT.tsenor-partial/journal      what is done, for --resume (journal.py)
    OUTPUT.tsenor-partial/old          the old output for an instant, where two names cannot be exchanged at once
    OUTPUT.tsenor-lock                 held by the one writer

The output does not exist, or is the previous complete checkpoint, or is the new complete one; never a part.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from filelock import FileLock, Timeout

from tsenor_cli.checkpoint.journal import Identity, Journal
from tsenor_cli.checkpoint.jsonfile import read_object
from tsenor_cli.checkpoint.writer import REPORT_FILE
from tsenor_cli.errors import (
    DISK_FULL,
    CheckFailed,
    InputRefused,
    OutputUnavailable,
    TsenorError,
    UsageError,
    is_out_of_memory,
)

_FUTILE = (InputRefused, CheckFailed, UsageError)  # the same run would end the same way again
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True)
class Staged:
    """An output in the making."""

    directory: Path  # becomes the output
    scratch: Path  # for files that only this run needs
    journal: Journal


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists or collides with the input, before any work is done.

    Raises:
        OutputUnavailable: it equals, contains or lies inside the input, or exists and may not be replaced.
    """
    real, real_source = output.resolve(), source.resolve()
    if real.is_relative_to(real_source) or real_source.is_relative_to(real):
        raise OutputUnavailable(f"the output {output} and the input {source} overlap", "give another -o")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputUnavailable(
            f"{output} exists", "give another -o, or --overwrite to replace it", code="output-exists"
        )
    if why := _why_not_to_replace(output):
        raise OutputUnavailable(
            f"{output} is {why}, so --overwrite leaves it alone", "give another -o", code="output-exists"
        )


def check_space(output: Path, output_bytes: int, input_bytes: int = 0) -> None:
    """Refuse to start when the new checkpoint cannot fit beside what is there; an unfinished one counts as its part.

    `input_bytes` of the input lie there, too, at a time.
    """
    place = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    there = sum(_bytes_on_disk(path) for path in _partial(output).rglob("*") if path.is_file())
    if free < output_bytes + input_bytes - there:
        needed = max(output_bytes - there, 0)
        beside = f", and {input_bytes:,} two shards of the input at a time" if input_bytes else ""
        raise TsenorError(
            f"{place} has {free:,} bytes free and the output needs {needed:,}{beside}",
            "free some space, or write elsewhere with -o",
            code="disk-full",
        )


def _bytes_on_disk(path: Path) -> int:
    """Less than its size where there are holes."""
    facts = path.stat()
    blocks: int | None = getattr(facts, "st_blocks", None)  # Windows does not count them
    return facts.st_size if blocks is None else blocks * 512


def identity_sha256(identity: Identity) -> str:
    """A short name of a run, for the report that its output carries."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_finished(output: Path, identity: Identity) -> bool:
    """Whether `output` is what the run `identity` makes, complete."""
    with suppress(InputRefused, OSError):
        return read_object(output / REPORT_FILE).get("identity") == identity_sha256(identity)
    return False


def already_finished(output: Path, identity: Identity) -> bool:
    """Whether an earlier run has made `output` as this one would; what it may have left beside it is swept."""
    if not is_finished(output, identity):
        return False
    with _plain_failures(output), _only_writer(output):
        _recover(_partial(output), output)
    return True


@contextmanager
def staged_output(output: Path, identity: Identity, *, overwrite: bool, resume: bool | None) -> Iterator[Staged]:
    """A staging directory that becomes `output` when the block ends well.

    When it does not, the directory stays if anything in the journal makes it worth going on; the error then has a note
    that says so.

    Args:
        output: its final place.
        identity: of the run, to know it again.
        overwrite: replace an output that exists.
        resume: go on with what an interrupted run left (True), start over (False), or refuse to choose (None).

    Raises:
        OutputUnavailable: another run is writing the same output, or left it unfinished; or it appeared meanwhile.
        TsenorError: the operating system refuses (disk full, no permission, read-only), or memory ran out.
    """
    partial = _partial(output)
    with _plain_failures(output):
        _make_directory(output.parent)
        with _only_writer(output):
            _recover(partial, output)
            if os.path.lexists(output) and not overwrite:
                raise OutputUnavailable(
                    f"{output} exists", "give another -o, or --overwrite to replace it", code="output-exists"
                )
            try:
                staged = _enter(partial, output, identity, resume)
                yield staged
                _sync_directories(staged.directory)
                _switch(staged.directory, output, partial / "old")
            except OutputUnavailable:
                raise
            except BaseException as error:
                if (old := partial / "old").exists() and not os.path.lexists(output):
                    error.add_note(f"the old output is in {old}, and the next run puts it back")
                    raise
                if is_finished(output, identity):
                    error.add_note("the output is complete all the same")
                elif _worth_keeping(partial, error):
                    error.add_note("the same command with --resume goes on where this one stopped")
                    raise
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def joined_output(output: Path, staged: Staged, rank: int) -> Iterator[Staged]:
    """The same staging directory for another process of the run than the first, which keeps it.

    Raises:
        TsenorError: as staged_output.
    """
    with _plain_failures(output):
        yield replace(staged, journal=staged.journal.of_process(rank))


def _enter(partial: Path, output: Path, identity: Identity, resume: bool | None) -> Staged:
    """Make the staging directory, or take over the one that is there."""
    journal = Journal(partial / "journal")
    if len(journal) and resume is None:
        raise OutputUnavailable(
            f"an interrupted run has left {output} unfinished",
            "repeat that run with --resume to go on, or with --no-resume to start over",
            code="unfinished-run",
        )
    if len(journal) and resume:
        assert journal.identity is not None
        _refuse_another_run(output, journal.identity, identity)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        journal.begin(identity)
    directory = partial / "checkpoint"
    directory.mkdir(exist_ok=True)
    return Staged(directory, partial, journal)


def _refuse_another_run(output: Path, before: Identity, now: Identity) -> None:
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    if changed:
        key, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise OutputUnavailable(
            f"cannot resume {output}: {key} was {before.get(key, 'not there')} and is {now.get(key, 'gone')}{more}",
            "make it what it was, or start over with --no-resume",
            code="resume-mismatch",
        )


def _worth_keeping(partial: Path, error: BaseException) -> bool:
    return not isinstance(error, _FUTILE) and len(Journal(partial / "journal")) > 0


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    lock = FileLock(output.with_name(output.name + ".tsenor-lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputUnavailable(
            f"another run is writing {output}", "wait for it, or give another -o", code="output-locked"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # one that stays hinders nobody
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _recover(partial: Path, output: Path) -> None:
    """Undo a switch that stopped half-way, and sweep what led to the output that is there, or leads nowhere."""
    old = partial / "old"
    if old.exists() and not os.path.lexists(output):
        old.rename(output)
    identity = Journal(partial / "journal").identity
    if identity is None or is_finished(output, identity):
        shutil.rmtree(partial, ignore_errors=True)


def _switch(staged: Path, output: Path, aside: Path) -> None:
    """Put the finished directory in the place of `output`, which may exist."""
    if not os.path.lexists(output):
        staged.rename(output)
    elif not _exchange(staged, output):
        output.rename(aside)
        try:
            staged.rename(output)
        except BaseException:  # a signal between the two renames included
            if not os.path.lexists(output):
                aside.rename(output)
            raise
    _sync_directory(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".tsenor-partial")


def _why_not_to_replace(output: Path) -> str | None:
    """All of the old output goes: only what tsenor itself has made may be in it, and nobody may stand in it."""
    if output.is_symlink() or not output.is_dir():
        return "not a directory"
    if Path.cwd().is_relative_to(output.resolve()):
        return "where you are"
    if os.path.ismount(output):
        return "a mount point, which cannot be replaced"
    if any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        return "not made by tsenor"
    return None


@contextmanager
def _plain_failures(output: Path) -> Iterator[None]:
    """What the operating system refuses, as one line each."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or output}: {error.strerror or error}"
        remedy, full = "mend this, or write elsewhere with -o", error.errno in DISK_FULL
        if error.errno == errno.EFBIG:
            remedy = "raise ulimit -f, or write to a file system that takes larger files"
        raise _with_notes(TsenorError(what, remedy, code="disk-full" if full else None), error) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "free some, or need less with --memory-budget or fewer --samples"
        raise _with_notes(TsenorError("out of memory", remedy, code="out-of-memory"), error) from error


def _with_notes(plain: TsenorError, error: BaseException) -> TsenorError:
    for note in getattr(error, "__notes__", ()):
        plain.add_note(note)
    return plain


def _make_directory(path: Path) -> None:
    """With its parents, so that a power cut does not take them away again."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directories(root: Path) -> None:
    for directory, _, _ in os.walk(root):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # Windows cannot
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(handle)
