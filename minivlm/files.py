"""Write a file so that it is either the old one or the new one, never a mixture.

The new content is written to a file next to the old one and flushed to disk. Then it replaces the old one in
a single step, which the file system does completely or not at all. So a full disk, a crash or a power cut in
the middle leaves the old file as it was.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from minivlm.errors import InputError


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block it becomes `path`.

    >>> with write_aside(folder / "config.json") as temporary:
    ...     temporary.write_text(text)

    Missing folders are created. If the block raises, `path` is untouched and the temporary file is removed.
    Whoever has the old file open or memory-mapped keeps it, complete.

    Raises:
        InputError: the file cannot be written (disk full, no permission, not a folder).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # of an ordinary new file; safetensors creates private ones
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write {path}: {reason}. What was there before is unchanged. Free some space, check the "
            "permissions, or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # already renamed, or never created
            temporary.unlink()


def _flush(path: Path) -> None:
    """Wait until the content of a file, or a folder's list of names, is on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what `write_aside` left when its process was killed. Nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) and path.is_file():
            with suppress(OSError):  # they do no harm
                path.unlink()
