"""Landlock: a process cannot do what it gave up, and can do everything else.

What is given up is gone for good, so each test has its own process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minivlm.classroom import landlock

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="needs Linux with Landlock")

# Each line is tried in a process that may change PLACE, and in one that may not.
CHANGES = {
    "write": "Path(PLACE, 'file').write_text('changed')",
    "append": "Path(PLACE, 'file').open('a')",
    "cut": "os.truncate(Path(PLACE, 'file'), 0)",
    "remove": "os.remove(Path(PLACE, 'file'))",
    "remove a folder": "os.rmdir(Path(PLACE, 'folder'))",
    "make": "Path(PLACE, 'new').touch()",
    "make a folder": "os.mkdir(Path(PLACE, 'new'))",
    "make a link": "os.symlink('file', Path(PLACE, 'new'))",
    "rename": "os.rename(Path(PLACE, 'file'), Path(PLACE, 'new'))",
    "move in": "os.rename('own', Path(PLACE, 'new'))",
    "move out": "os.rename(Path(PLACE, 'file'), 'new')",
    "from a child": "subprocess.run(['rm', str(Path(PLACE, 'file'))], check=True, stderr=subprocess.PIPE)",
}


def run(code: str, allowed: Path, tmp_path: Path) -> str:
    """What a process prints that runs code and may change nothing outside `allowed`."""
    allowed.mkdir(exist_ok=True)
    (allowed / "own").touch()
    program = (
        "import os, subprocess; from pathlib import Path\n"
        "from minivlm.classroom.landlock import change_only\n"
        f"PLACE = {str(tmp_path / 'elsewhere')!r}\n"
        "change_only([Path('.')])\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=allowed, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("mine")
    return folder


@needs_landlock
def test_changes_are_refused_elsewhere_and_nowhere_else(tmp_path: Path, elsewhere: Path) -> None:
    again = "f'rm -rf {PLACE}; mkdir -p {PLACE}/folder; touch {PLACE}/file', shell=True"
    code = "".join(
        "Path('own').touch()\n"
        f"try:\n    {change}\nexcept (OSError, subprocess.CalledProcessError):\n    print({name!r})\n"
        f"else:\n    subprocess.run({again})\n"
        for name, change in CHANGES.items()
    )
    refused = run(code, tmp_path / "allowed", tmp_path).splitlines()
    assert refused == [name for name in CHANGES if name != "cut" or landlock.version() >= 3]
    assert sorted(os.listdir(elsewhere)) == ["file", "folder"]
    assert (elsewhere / "file").read_text() == "mine"
    assert run(code, tmp_path, tmp_path) == "", "the same lines, where changes are allowed"


@needs_landlock
def test_reading_and_starting_programs_go_on(tmp_path: Path, elsewhere: Path) -> None:
    code = "print(Path(PLACE, 'file').read_text()); subprocess.run(['true'], check=True)"
    assert run(code, tmp_path / "allowed", tmp_path) == "mine\n"


@pytest.mark.skipif(landlock.version() < 6, reason="needs Landlock 6, in Linux 6.12 and later")
def test_others_get_no_signals_and_no_connections(tmp_path: Path) -> None:
    """The signal is 0, which is delivered to nobody: only the permission is looked at."""
    name = f"\0minivlm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = (
            "import socket\n"
            "def outcome(act):\n"
            "    try:\n        act()\n"
            "    except PermissionError:\n        return 'refused'\n"
            "    return 'done'\n"
            f"print(outcome(lambda: os.kill({os.getpid()}, 0)))\n"
            f"print(outcome(lambda: socket.socket(socket.AF_UNIX).connect({name!r})))\n"
            "own = subprocess.Popen(['sleep', '600'])\n"
            "print(outcome(own.kill), own.wait())\n"
        )
        assert run(code, tmp_path / "allowed", tmp_path) == "refused\nrefused\ndone -9\n"


@needs_landlock
def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        landlock.change_only([tmp_path / "missing"])
    (tmp_path / "file").write_text("can still be written")


def test_where_there_is_none_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert landlock.version() == 0
    assert landlock.change_only([tmp_path]) is False
