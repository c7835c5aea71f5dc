"""What is asked of the hub beside a whole snapshot. huggingface_hub does the talking: tokens, retries, mirrors, Xet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Event
from typing import Any, Self

from tsenor_cli.checkpoint.jsonfile import MAX_JSON_BYTES
from tsenor_cli.errors import InputRefused, TsenorError

_MOST_HEADERS = 2**17  # bytes that the headers of most shards fit into


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    size: int  # bytes
    content: str  # its SHA-256, or git's hash of it where it is small


@dataclass(frozen=True)
class Repository:
    """One commit of a model on the hub."""

    name: str  # org/name
    commit: str
    files: Mapping[str, HubFile]  # by their names, all of which stay inside a directory that they are put into

    def start_of_shard(self, file: str) -> bytes:
        """The header of a safetensors file and its length before it; not all of it if that length makes no sense.

        Raises:
            InputRefused: the hub does not give it.
        """
        size = self.files[file].size
        with _refusing(self.name):
            start = self._first_bytes(file, min(_MOST_HEADERS, size))
            end = 8 + int.from_bytes(start[:8], "little")
            if len(start) < end <= min(8 + MAX_JSON_BYTES, size):
                start = self._first_bytes(file, end)
        return start[:end]

    def fetch_small(self, file: str, directory: Path) -> Path:
        """Put a file into `directory` under its name, before the run begins.

        Raises:
            InputRefused: the hub does not give it.
        """
        with _refusing(self.name):
            return self._download(file, directory, Event())

    def fetch_shard(self, file: str, directory: Path, stopped: Event) -> Path:
        """Put a file into `directory` under its name, in the middle of the run; it is given up when `stopped` is set.

        Raises:
            TsenorError: the hub does not give it, or not any more.
        """
        try:
            return self._download(file, directory, stopped)
        except failures() as error:
            if is_of_the_system(error):
                raise
            raise TsenorError(
                f"{file} of {self.name} cannot be fetched ({reason(error)})",
                "see that the hub can be reached and still has it",
                code="fetch-failed",
            ) from error

    def _download(self, file: str, directory: Path, stopped: Event) -> Path:
        from huggingface_hub import hf_hub_download

        bar: Any = _silent_bar(stopped)
        return Path(hf_hub_download(self.name, file, revision=self.commit, local_dir=directory, tqdm_class=bar))

    def _first_bytes(self, file: str, count: int) -> bytes:
        """So many, even of a server that knows no ranges and begins to send everything."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its documentation names them
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if not count:
            return b""
        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        found = bytearray()
        with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            for part in response.iter_bytes():
                found += part
                if len(found) >= count:
                    break
        return bytes(found[:count])


def find_repository(name: str, revision: str | None) -> Repository:
    """What the hub has under this name, at the commit that `revision` means now.

    Raises:
        InputRefused: nothing, or nothing that can be used; or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _refusing(name):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise InputRefused(f"the hub does not say which commit of {name} it has", "leave out --no-cache-input")
    files = {}
    for found in info.siblings or []:
        _refuse_unsafe(name, found.rfilename)
        content = found.lfs.sha256 if found.lfs is not None else found.blob_id
        if found.size is None or found.size < 0 or content is None:
            raise InputRefused(
                f"the hub does not tell size and hash of {found.rfilename} in {name}", "leave out --no-cache-input"
            )
        files[found.rfilename] = HubFile(found.size, content)
    return Repository(name, info.sha, files)


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: errors of its own, of its HTTP library (versions 1 and 2 have two), and of Xet."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, ValueError, RuntimeError)


def reason(error: Exception) -> str:
    """What one of these says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except failures() as error:
        if is_of_the_system(error):
            raise
        raise InputRefused(
            f"the hub has no usable {name} ({reason(error)})",
            "check the name, the revision, HF_TOKEN and the network",
            code="no-checkpoint",
        ) from error


def is_of_the_system(error: Exception) -> bool:
    """Such as a full disk. The hub's errors are OSErrors, too, without a number."""
    return isinstance(error, OSError) and error.errno is not None


def _refuse_unsafe(repository: str, file: str) -> None:
    """Names become paths here: none may lead out of the directory, on any system, or be spelt in two ways."""
    path = PureWindowsPath(file)  # takes both kinds of slashes
    odd = "\0" in file or PurePosixPath(file).as_posix() != file
    if odd or not path.parts or path.drive or path.root or ".." in path.parts:
        raise InputRefused(
            f"{repository} has a file named {file!r}", "do not trust this checkpoint", code="unsafe-file"
        )


class _StoppedError(Exception):
    """Nobody waits for this download any more."""


def _silent_bar(stopped: Event) -> type:
    """A progress bar as huggingface_hub uses them. It shows nothing, and is where a download can be stopped."""

    class Bar:
        n = total = 0

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, _count: float | None = 1) -> None:
            if stopped.is_set():
                raise _StoppedError

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
