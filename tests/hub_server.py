"""A small Hub on this machine: as much of its file protocol as downloading a checkpoint needs.

Small files are answered at once, large ones (safetensors) by a redirect to a store that serves ranges, with
the headers of Git LFS: X-Linked-Etag is the SHA-256 of the contents, X-Linked-Size their length.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Files = dict[str, bytes]


def commit(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repo:
    """The files of each commit, and which commit the branches and tags mean."""

    commits: dict[str, Files]
    refs: dict[str, str] = field(default_factory=lambda: {"main": commit(1)})
    # Status and headers with which files (gated repos) or everything (private ones) are refused.
    files_refused: tuple[int, dict[str, str]] | None = None
    refused: tuple[int, dict[str, str]] | None = None


@dataclass
class Request:
    """A request that the server received, and how many bytes of a file it sent in response."""

    method: str
    path: str
    range: str | None
    sent: int = 0


class HubServer(ThreadingHTTPServer):
    """Serves `repos`; `requests` says what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, int] = {}  # how often the connection breaks off in the middle of a file
        self.flips: set[str] = set()  # files that arrive with a wrong bit
        self.claims: dict[str, int] = {}  # files that say to be larger than they are
        self.ignores_ranges = False
        self.pauses: dict[str, float] = {}  # seconds between two pieces of 80 bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> dict[str, list[tuple[str | None, int]]]:
        """(range, bytes sent) of every GET of a file, by the file's name."""
        found: dict[str, list[tuple[str | None, int]]] = {}
        for request in self.requests:
            if request.method == "GET" and "/api/" not in request.path and request.sent:
                found.setdefault(request.path.rpartition("/")[2], []).append((request.range, request.sent))
        return found


@contextmanager
def serve() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.request_seen = Request(self.command, path, self.headers.get("Range"))
        self.server.requests.append(self.request_seen)
        parts = re.fullmatch(
            r"(?:/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)|/([^/]+/[^/]+)/(resolve|store)/([^/]+)/(.+))",
            path,
        )
        if parts is None:
            return self._refuse(404, {"X-Error-Code": "RepoNotFound"})
        name, kind, revision, file = (
            parts[1] or parts[4],
            parts[2] or parts[5],
            parts[3] or parts[6],
            parts[7],
        )
        repo = self.server.repos.get(name)
        if repo is None:
            return self._refuse(404, {"X-Error-Code": "RepoNotFound"})
        if repo.refused is not None:
            return self._refuse(*repo.refused)
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[sha]
        if kind == "revision":
            return self._send(_json({"id": name, "sha": sha, "siblings": [{"rfilename": f} for f in files]}))
        if kind == "tree":
            entries = [_entry(path, data, self.server.claims.get(path)) for path, data in files.items()]
            return self._send(_json(entries))
        if repo.files_refused is not None:
            return self._refuse(*repo.files_refused)
        if file not in files:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        if kind == "store":
            return self._send_from_store(file, files[file])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_id(files[file])}"'}
        if not _is_large(file):
            return self._send(files[file], headers, counted=True)
        headers |= {
            "X-Linked-Etag": f'"{_sha(files[file])}"',
            "X-Linked-Size": str(self.server.claims.get(file, len(files[file]))),
        }
        # A different host than the Hub's, as in reality: the library uses only the Hub's headers.
        store = f"http://localhost:{self.server.server_port}/{name}/store/{sha}/{file}"
        headers |= {"Location": store, "Content-Length": "0"}
        return self._begin(302, headers)

    def _send_from_store(self, file: str, data: bytes) -> None:
        status, headers, start = 200, {"Accept-Ranges": "bytes", "ETag": f'"{_sha(data)}"'}, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not self.server.ignores_ranges:
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if file in self.server.flips:
            data = data[:-1] + bytes([data[-1] ^ 1])
        data = data[start:]
        self._begin(status, headers | {"Content-Length": str(len(data))})
        if self.command == "HEAD":
            return
        if self.server.cuts.get(file, 0):
            self.server.cuts[file] -= 1
            data = data[: len(data) // 2]
            self.close_connection = True  # before all of Content-Length was sent
        self.request_seen.sent = len(data)
        if file in self.server.pauses:
            return self._trickle(data, self.server.pauses[file])
        self.wfile.write(data)

    def _trickle(self, data: bytes, pause: float) -> None:
        with suppress(ConnectionError):  # the other side gives up
            for start in range(0, len(data), 80):
                self.wfile.write(data[start : start + 80])
                time.sleep(pause)

    def _send(self, data: bytes, headers: dict[str, str] | None = None, counted: bool = False) -> None:
        self._begin(200, {"Content-Length": str(len(data))} | (headers or {}))
        if self.command == "GET":
            self.request_seen.sent = len(data) if counted else 0
            self.wfile.write(data)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._begin(status, {"Content-Length": "0"} | headers)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def _is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _entry(path: str, data: bytes, claimed: int | None) -> dict[str, object]:
    size = claimed or len(data)
    entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": _git_id(data)}
    if _is_large(path):
        entry["lfs"] = {"oid": _sha(data), "size": size, "pointerSize": 134}
    return entry


def _json(values: object) -> bytes:
    return json.dumps(values).encode()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
