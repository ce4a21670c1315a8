"""Weights from the Hub are what the Hub has: their SHA-256 is the name of their file in the cache.

A bit that flips on the way or on the disk changes a weight, and a model with a wrong weight answers without a
word. The Hub's cache names large files by their SHA-256, so each can be compared with its own name. It reads
all bytes (a few seconds for some gigabytes), so it is done once for each file.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from minivlm.errors import InputError

NOTE = ".minivlm-checked"  # in the cache folder of a repo: what was compared, and when that was written


def check_sums(folder: Path) -> None:
    """Compare each large file of a snapshot in the Hub's cache with its SHA-256, once.

    A file that was written again is compared again. Where the note cannot be written, every call compares;
    where the cache has copies in place of links (on some Windows machines), none does.

    Raises InputError: a file is damaged.
    """
    note = folder.parents[1] / NOTE
    noted: set[str] = set()
    with suppress(OSError):
        noted.update(note.read_text(encoding="utf-8", errors="replace").splitlines())
    found = set()
    for path in sorted(folder.iterdir()):
        sha = path.readlink().name if path.is_symlink() else ""
        if not re.fullmatch("[0-9a-f]{64}", sha):  # small files are named by another sum
            continue
        line = f"{sha} {path.stat().st_mtime_ns}"
        if line not in noted:
            _check(path, sha)
        found.add(line)
    if not found <= noted:
        with suppress(OSError):
            note.write_text("".join(f"{line}\n" for line in sorted(found | noted)), encoding="utf-8")


def _check(path: Path, sha: str) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha:
            raise InputError(
                f"{path} is damaged or incomplete (its SHA-256 is not that of the Hub): delete "
                f"{path.resolve()} and download it again"
            )
