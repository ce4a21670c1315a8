"""Writing a file so that it is either the old one or the new one, never half of each.

The new content goes into a file beside the old one, is forced to the disk, and then takes the old one's
name in one step, which the file system does completely or not at all. A full disk, a crash or a power cut
in the middle therefore leaves the old file as it was.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from minivlm.errors import InputError


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; at the end of the block it becomes `path`.

    >>> with write_aside(folder / "config.json") as temporary:
    ...     temporary.write_text(text)

    Missing folders are made. When the block raises, `path` is untouched and the temporary file is removed.
    A file that someone has open or memory-mapped stays whole for them: they keep the old one.

    Raises:
        InputError: the file cannot be written (disk full, no permission, not a folder).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as files are usually made here; safetensors makes private ones
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
        with suppress(OSError):  # gone, or never made
            temporary.unlink()


def _flush(path: Path) -> None:
    """Wait until the disk has what was written to a file, or which names a folder holds."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
