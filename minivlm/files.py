"""Write a file so that it is either the old one or the new one, never a mixture.

The new content is written to a file next to the old one and flushed to disk. Then it replaces the old one in
a single step, which the file system does completely or not at all. So a full disk, a crash or a power cut in
the middle leaves the old file as it was.

Only a regular file is ever replaced, or a new name taken. Links are followed: the file that one leads to is
replaced, and the link stays. A device, a pipe or a folder is refused; a rename would put a file in its place.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
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
        InputError: the file cannot be written (disk full, no permission, not a folder), or `path` names
            something else than a regular file.
    """
    path = _behind_links(path)
    # A name has 255 bytes at most; 60 characters leave room for the rest in any alphabet.
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.tmp")
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


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to write files into; at the end of the block it becomes `path`, a new folder.

    If the block raises, the temporary folder is removed.

    Raises InputError: something is there already; it cannot be written.
    """
    _check_new(path)
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Free some space, check the permissions, or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already renamed, or never made


def check_output(path: Path, inputs: Iterable[str | Path] = (), replace: bool = True) -> None:
    """Refuse before the work what `write_aside` would refuse after it. Nothing is written here.

    Args:
        inputs: files that the program reads, which must stay as they are. Missing ones are ignored.
        replace: whether a file of this name may be replaced.

    Raises InputError: `path` is one of the inputs, by whatever name or link; it is no regular file; it exists
    although it may not be replaced; its folder cannot be made or written into.
    """
    target = _behind_links(path)
    if any(_same(target, Path(name)) for name in inputs):
        raise InputError(f"{path} is read here, and would be overwritten: choose another name to write to")
    if not replace and target.exists():
        raise InputError(f"{path} exists, and would be overwritten: choose another name, or remove it first")
    folder = next(folder for folder in target.parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: {folder} is not a folder. Choose another name to write to")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: {folder} may not be written into. Choose another folder")


def check_new_folder(path: Path) -> None:
    """Refuse before the work what `folder_aside` would refuse after it. Nothing is written here.

    Raises InputError: something is there already; its folder cannot be made or written into.
    """
    _check_new(path)
    check_output(path / "file")


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"{path} exists: choose another name for a folder, or remove it first")


def _behind_links(path: Path) -> Path:
    """Where a file of this name is or will be. Raises InputError: something else than a file is there."""
    try:
        # Asked before links are resolved: /dev/stdout leads to a pipe, which has no path.
        regular = stat.S_ISREG(path.stat().st_mode)
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # a new name
        regular = True
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}. Choose another name to write to") from error
    if not regular:
        raise InputError(f"{path} is a folder, a device or a pipe: give the name of a file to write to")
    return Path(os.path.realpath(path))


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist, or cannot be asked about
        return False


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
