"""A repo id leads to a folder, or to a refusal that says what to do. The Hub here is a server of our own."""

import functools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest

from minivlm.errors import InputError
from minivlm.weights import find_folder

SHA = "0" * 39 + "1"
FILES = {
    "config.json": b'{"model_type": "paligemma"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"text",
}


class Hub(BaseHTTPRequestHandler):
    """Two repos: owner/open, and owner/gated, whose files need a license to be accepted."""

    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        if "/owner/" not in path or "/unknown" in path:
            self._refuse(404, "RepoNotFound")
        elif path.endswith("/revision/main"):
            files = [{"rfilename": name} for name in FILES]
            self._send(json.dumps({"id": "owner/x", "sha": SHA, "siblings": files}).encode())
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": f"oid-{name}"}
                for name, data in FILES.items()
            ]
            self._send(json.dumps(entries).encode())
        elif "/gated/" in path:
            self._refuse(403, "GatedRepo")
        else:
            self._send(FILES[path.rpartition("/")[2]])

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        Hub.requests.clear()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets where the Hub is; the cache is a fresh folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    download = huggingface_hub.snapshot_download

    def at(port: int) -> None:
        replacement = functools.partial(
            download, endpoint=f"http://127.0.0.1:{port}", cache_dir=tmp_path / "cache"
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", replacement)

    return at


CLOSED = 9  # nobody listens at this port


def test_a_local_folder_needs_no_hub(tmp_path: Path, use):
    use(CLOSED)
    assert find_folder(tmp_path) == tmp_path
    assert find_folder(str(tmp_path)) == tmp_path


def test_a_repo_is_downloaded_once_and_then_found_offline(server: ThreadingHTTPServer, use):
    use(server.server_port)
    folder = find_folder("owner/open")
    # No pickles, no texts: only what can be used.
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert not any("pytorch_model.bin" in path for path in Hub.requests)
    use(CLOSED)
    assert find_folder("owner/open") == folder


def test_unknown_repo(server: ThreadingHTTPServer, use):
    use(server.server_port)
    with pytest.raises(
        InputError, match="no folder owner/unknown, and the Hub has no public repo of that name"
    ):
        find_folder("owner/unknown")


def test_gated_repo(server: ThreadingHTTPServer, use):
    use(server.server_port)
    with pytest.raises(InputError, match=r"accept its license.*huggingface.co/owner/gated, then log in"):
        find_folder("owner/gated")


def test_no_network_and_nothing_in_the_cache(use):
    use(CLOSED)
    with pytest.raises(InputError, match=r"no folder owner/open.*cannot be had.*check the connection"):
        find_folder("owner/open")


def test_offline_by_environment(use, monkeypatch: pytest.MonkeyPatch):
    """What HF_HUB_OFFLINE=1 does."""
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, local_files_only=True),
    )
    with pytest.raises(InputError, match=r"no folder owner/open.*cannot be had"):
        find_folder("owner/open")


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a b/c", "owner/repo/more", "../up"])
def test_neither_folder_nor_repo_id(name: str, use):
    use(CLOSED)
    with pytest.raises(InputError, match="neither a folder nor a repo id"):
        find_folder(name)


def test_a_path_is_never_looked_up(tmp_path: Path, use):
    use(CLOSED)
    with pytest.raises(InputError, match="neither a folder nor a repo id"):
        find_folder(Path("owner/open"))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file: give the folder"):
        find_folder(file)
