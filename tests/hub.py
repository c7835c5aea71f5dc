"""An imitation of the hub: what huggingface_hub asks for a model, answered from a directory, on this machine alone."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 2**12  # bytes sent at once


class Hub:
    """Serves `directory` as the model `name`. Use as a context manager.

    Attributes:
        endpoint: its address, for HF_ENDPOINT.
        asked: every request as (method, file, range), in order.
        commit: that `main` is.
        before_piece: called with a file's name and how much of it has been sent, before more is; only for whole files.
        content: what is sent for a file, by its name, in place of what it is.
        cut: after so many bytes the connection ends, by the file's name.
        gone: files that are not found.
        names: more names that the model's files are said to have.
        knows_ranges: whether it sends a part of a file when asked for it.
    """

    def __init__(self, directory: Path, name: str = "org/tiny") -> None:
        self.directory, self.name, self.commit = directory, name, COMMIT
        self.asked: list[tuple[str, str, str | None]] = []
        self.before_piece: Callable[[str, int], object] = lambda _file, _sent: None
        self.content: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.gone: set[str] = set()
        self.names: list[str] = []
        self.knows_ranges = True

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The files that were asked for whole, in order."""
        return [file for method, file, part in self.asked if method == "GET" and part is None]

    def read(self, file: str) -> bytes | None:
        """What is sent for it."""
        path = self.directory / file
        if file in self.gone or not (file in self.content or path.is_file()):
            return None
        return self.content[file] if file in self.content else path.read_bytes()

    def listing(self) -> dict[str, Any]:
        files = [path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file()]
        return {"id": self.name, "sha": self.commit, "siblings": [*map(self._entry, sorted(files) + self.names)]}

    def tree(self) -> list[dict[str, Any]]:
        """The same, as it is asked for before a download of everything."""
        found = []
        for entry in self.listing()["siblings"]:
            lfs = entry.get("lfs")
            parts = {"lfs": {**lfs, "oid": lfs["sha256"]}} if lfs is not None else {}
            found.append(
                {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"], **parts}
            )
        return found

    def _entry(self, file: str) -> dict[str, Any]:
        raw = (self.directory / file).read_bytes() if file not in self.names else b""
        found: dict[str, Any] = {"rfilename": file, "size": len(raw), "blobId": hashlib.sha1(raw).hexdigest()}
        if file.endswith(".safetensors"):
            found["lfs"] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_content: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path in {f"/api/models/{self.hub.name}", f"/api/models/{self.hub.name}/revision/main"} or path == (
            f"/api/models/{self.hub.name}/revision/{self.hub.commit}"
        ):
            self._send(json.dumps(self.hub.listing()).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{self.hub.name}/tree/"):
            self._send(json.dumps(self.hub.tree()).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(rf"/{self.hub.name}/resolve/({self.hub.commit}|main)/(.+)", path):
            self._send_file(match[2], with_content=with_content)
        else:
            self._refuse("RepoNotFound")

    def _send_file(self, file: str, *, with_content: bool) -> None:
        part = self.headers.get("Range")
        self.hub.asked.append((self.command, file, part))
        raw = self.hub.read(file)
        if raw is None:
            self._refuse("EntryNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": self.hub.commit}
        if not with_content:
            self._start(200, headers | {"Content-Length": str(len(raw))})
        elif part is not None and self.hub.knows_ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()
            self._send(raw[int(first) : int(last) + 1 if last else None], headers, 206)
        else:
            self._send(raw, headers, file=file)

    def _send(self, raw: bytes, headers: dict[str, str], code: int = 200, file: str | None = None) -> None:
        self._start(code, headers | {"Content-Length": str(len(raw))})
        for first in range(0, len(raw), _PIECE):
            if file is not None:
                self.hub.before_piece(file, first)
                if self.hub.cut.get(file, len(raw)) <= first:
                    self.close_connection = True
                    return
            try:
                self.wfile.write(raw[first : first + _PIECE])
            except OSError:  # whoever asked has enough
                self.close_connection = True
                return

    def _refuse(self, why: str) -> None:
        self._start(404, {"X-Error-Code": why, "Content-Length": "0"})

    def _start(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
