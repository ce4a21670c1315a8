"""Files that lie in a tar: photos.tar/1.jpg is the member 1.jpg of photos.tar, wherever a picture is named.

A tar is a row of files, each after a header that says its name and its length; nothing is compressed. So it
is enough to go from header to header once, and a member is read from its place alone. The places in a tar are
kept for a while, since whoever reads one member mostly reads its neighbors as well.

A tar may come from somebody else. Nothing is unpacked here, and a name that would lead out of a folder, or
that stands for a link or a device, is refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

from minivlm.errors import InputError

BLOCK = 512  # bytes, to which headers and files are filled up; at the end, two blocks of zeros
KEPT = 16  # tars whose places are kept
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin


class Place(NamedTuple):
    """Where the bytes of a member are."""

    offset: int
    size: int


def tar_of(path: Path) -> Path | None:
    """The tar that a path leads into, if it does: a file where there would have to be a folder."""
    return next((one for one in path.parents if one.suffix.lower() == ".tar" and one.is_file()), None)


def members_of(tar: Path) -> Mapping[str, Place]:
    """The files in a tar by name, in their order.

    Raises InputError: it cannot be read, is compressed, truncated or no tar; it has a member that is no file,
    that would lie outside, or whose name is given twice.
    """
    try:
        return _members_of(tar, version_of(tar))
    except OSError as error:
        raise InputError(f"{tar} cannot be read ({error.strerror}): expected a tar") from error


def version_of(tar: Path) -> tuple[int, int]:
    """Another one after the tar was written again: what is kept about it no longer holds."""
    now = tar.stat()
    return now.st_mtime_ns, now.st_size


def open_member(tar: Path, name: str) -> BinaryIO:
    """The bytes of a member. Raises InputError: as `members_of`; there is none of this name."""
    place = members_of(tar).get(name)
    if place is None:
        raise InputError(f"{tar} has no {name}: check its name")
    with tar.open("rb") as file:
        file.seek(place.offset)
        content = file.read(place.size)
    if not content:
        raise InputError(f"{tar / name} is empty: make the tar again")
    return io.BytesIO(content)


@lru_cache(KEPT)
def _members_of(tar: Path, version: tuple[int, int]) -> dict[str, Place]:
    members: dict[str, Place] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                name = _checked_name(tar, info.name)
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if info.isdir():
                    continue
                if not info.isfile() or info.issparse():
                    raise InputError(f"{tar}: {name} is a link, a device or sparse: put plain files into it")
                if name in members:
                    raise InputError(f"{tar} has {name} twice: leave one of them")
                members[name] = Place(info.offset_data, info.size)
    except tarfile.TarError as error:
        with tar.open("rb") as start:
            if start.read(6).startswith(COMPRESSED):
                raise InputError(f"{tar} is compressed: unpack it to a plain tar first") from error
        raise _damaged(tar, f"{error}") from error
    with tar.open("rb") as file:  # one that was cut off between two members has no other mark
        file.seek(end)
        rest = file.read(2 * BLOCK)
    if len(rest) < 2 * BLOCK or any(rest):
        raise _damaged(tar, "it does not end like a tar")
    return members


def _damaged(tar: Path, why: str) -> InputError:
    return InputError(f"{tar} is truncated, damaged or no tar ({why}): copy or download it again")


def _checked_name(tar: Path, name: str) -> str:
    """The name of a member without ./ before it. Raises InputError: it leads out of the tar."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(name)
        if path.anchor or ".." in path.parts:
            raise InputError(f"{tar} has a file {name!r}, which would lie outside of it: make the tar again")
    return PurePosixPath(name).as_posix()
