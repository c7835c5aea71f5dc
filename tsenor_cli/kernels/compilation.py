"""Machine code is kept between processes, in a directory that nobody else can write to.

Whoever can write a cached kernel can run code as its next user. So the cache lives in `$TSENOR_CACHE_DIR`, else
`$XDG_CACHE_HOME/tsenor`, else `~/.cache/tsenor`, and is used only if the directory is ours and closed to others;
otherwise this process compiles into a fresh private directory, which goes away with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from atexit import register
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np
from filelock import FileLock

from tsenor_cli.kernels.contract import Untyped

VARIABLE = "TSENOR_CACHE_DIR"


@cache
def cache_directory() -> Path:
    """Where this process keeps compiled kernels: <base>/kernels-<hash>, existing, writable, ours, mode 0700.

    The hash covers every source file of the kernels, because numba notices a changed function but not a changed callee.
    """
    base = _base_directory()
    try:
        directory = _private(base) / f"kernels-{_fingerprint()}"
        _private(directory)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="tsenor-"))
        register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def compiled(function: Callable[..., Any]) -> Untyped:
    """Compile on first call, without the GIL, without reassociation: every machine gives the same bits."""
    with _caching_here():
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def compiled_callback(signature: object, function: Callable[..., None]) -> int:
    """Compile now and return the address of a C function; `function` may be a closure over numbers."""
    with _caching_here():
        callback: Untyped = numba.cfunc(signature, cache=True)(function)
    _alive.append(callback)
    return int(callback.address)


@contextmanager
def compiling() -> Iterator[None]:
    """Hold while calling something for the first time: one process compiles, the others wait and load.

    numba replaces its files atomically, but numbers them: two processes that add different entries to one index at
    the same time could each leave an index that points to the code of the other.
    """
    with FileLock(cache_directory() / "lock"):
        yield


_decorating = RLock()
_alive: list[object] = []  # an address is good only as long as its owner


def _base_directory() -> Path:
    if named := os.environ.get(VARIABLE):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(caches) / "tsenor"


def _private(directory: Path) -> Path:
    """Create `directory` for us alone, or accept an existing one that is; raise PermissionError for any other."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    # On Windows a user's folders are closed to others, and owner and mode say nothing.
    foreign = hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & 0o022)
    if foreign or not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{directory} can be written to by others")
    return directory


def _fingerprint() -> str:
    digest = hashlib.sha256(f"numba {numba.__version__} llvmlite {llvmlite.__version__} {np.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _caching_here() -> Iterator[None]:
    """Point numba to our directory for as long as it takes to decorate one function; it reads the setting then.

    The setting is that of all threads, and several may import kernels at once.
    """
    config: Untyped = numba.config
    with _decorating:
        before = config.CACHE_DIR
        config.CACHE_DIR = str(cache_directory())
        try:
            yield
        finally:
            config.CACHE_DIR = before
