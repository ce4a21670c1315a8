"""A namespace: files elsewhere are read-only, and /dev/shm is empty and private."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivlm.classroom.namespace import SHARED_MEMORY

ENTER = """
import ctypes, os, sys
from pathlib import Path
from minivlm.classroom import namespace
own, elsewhere = map(Path, sys.argv[1:])
os.chdir(own)
"""
# Python itself may lie where an ordinary user cannot read, so the rights go when all is imported.
NOBODY = """
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, *map(ctypes.c_ulong, (1, 0, 0, 0)))  # or its own /proc/self is closed to it
"""
TRY = """
print(namespace.enter(own), os.getuid())
for change in (
    lambda: os.chmod(elsewhere, 0o600),
    lambda: os.utime(elsewhere),
    lambda: elsewhere.write_text("changed"),
    lambda: elsewhere.unlink(),
    lambda: Path("new").write_text("mine"),
    lambda: (own / "new").chmod(0o600),
    lambda: Path("/dev/null").write_text("gone"),
    lambda: (namespace.SHARED_MEMORY / "new").write_text("mine"),
):
    try:
        change()
        print("yes", end=" ")
    except OSError:
        print("no", end=" ")
print(os.listdir(namespace.SHARED_MEMORY))
"""


def run(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", ENTER + code, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a file and a folder for the process. Everybody may come in, unlike in pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own").mkdir()
        (Path(folder) / "file").write_text("mine")
        for path in (Path(folder), Path(folder, "own"), Path(folder, "file")):
            path.chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("user", ["this one", "nobody"])
def test_files_elsewhere_are_read_only(place: Path, user: str) -> None:
    if user == "nobody" and (not hasattr(os, "geteuid") or os.geteuid() != 0):
        pytest.skip("only root can become somebody else, and the other case is an ordinary user")
    own = place / "own"
    as_user = NOBODY if user == "nobody" else ""
    if run(as_user + "print(namespace.enter(own))", own, place / "file") == "False\n":
        pytest.skip("this system allows no namespaces")
    common = SHARED_MEMORY / f"minivlm-test-{secrets.token_hex(4)}"
    common.touch()
    before = (place / "file").stat()
    try:
        said, changes = run(as_user + TRY, own, place / "file").splitlines()
        assert common.exists()
    finally:
        common.unlink()
    assert said.split() == ["True", "65534" if user == "nobody" else str(os.getuid())]
    assert changes == "no no no no yes yes yes yes ['new']"
    after = (place / "file").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert (own / "new").read_text() == "mine"


def test_where_it_is_not_allowed_nothing_changes(place: Path) -> None:
    code = """
namespace.MOUNT_SETATTR = -1  # the last of the calls is missing, as on a kernel before 5.12
print(namespace.enter(own), os.getuid(), elsewhere.write_text("changed"))
"""
    assert run(code, place / "own", place / "file") == f"False {os.getuid()} 7\n"
    assert (place / "file").read_text() == "changed"
