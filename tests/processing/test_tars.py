"""A picture in a tar is opened like one in a folder, and a tar that is damaged or hostile is refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing import load_picture
from minivlm.processing.images import open_file, open_header
from minivlm.processing.tars import BLOCK, members_of, tar_of


def picture(seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, *members: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_is_opened_by_its_path(form: int, tmp_path: Path) -> None:
    names = ["a.png", "ä" * 40 + "/" + "ö" * 40 + ".png", "./b.png"]  # the second is long for a header
    tar = write(tmp_path / "x.tar", *((name, picture(n)) for n, name in enumerate(names)), form=form)
    assert list(members_of(tar)) == ["a.png", names[1], "b.png"]
    for number, name in enumerate(members_of(tar)):
        with open_file(tar / name, "picture") as file:
            assert file.read() == picture(number)
        with Image.open(io.BytesIO(picture(number))) as wanted:
            assert np.array_equal(np.asarray(load_picture(tar / name)), np.asarray(wanted))
        with open_header(tar / name) as header:
            assert header.size == (30, 20)
    with pytest.raises(InputError, match=r"x\.tar has no c\.png"):
        load_picture(tar / "c.png")


def test_folders_and_files_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "a.png").write_bytes(picture())
    assert load_picture(tmp_path / "folder.tar" / "a.png").size == (30, 20)
    assert tar_of(tmp_path / "folder.tar" / "a.png") is None
    with pytest.raises(InputError, match="no such file"):
        load_picture(tmp_path / "folder.tar" / "b.png")
    with pytest.raises(InputError, match="no such file"):
        load_picture(tmp_path / "missing.tar" / "b.png")


def test_a_tar_that_is_written_again(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", ("a.png", picture(0)))
    assert list(members_of(tar)) == ["a.png"]
    write(tar, ("b.png", picture(0)))
    os.utime(tar, ns=(0, 1))
    assert list(members_of(tar)) == ["b.png"]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """In a header, in a member, between two of them, or in the end."""
    whole = write(tmp_path / "x.tar", ("a.png", picture(0)), ("b.png", picture(1))).read_bytes()
    place = max(place.offset + place.size for place in members_of(tmp_path / "x.tar").values())
    end = -(-place // BLOCK) * BLOCK + 2 * BLOCK
    for cut in (1, 100, BLOCK, BLOCK + 1, 3 * BLOCK, 4 * BLOCK + 5, end - 2 * BLOCK, end - BLOCK, end - 1):
        (tmp_path / f"{cut}.tar").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"is truncated, damaged or no tar"):
            members_of(tmp_path / f"{cut}.tar")
    (tmp_path / "end.tar").write_bytes(whole[:end])
    assert list(members_of(tmp_path / "end.tar")) == ["a.png", "b.png"]


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 2000, picture()])
def test_no_tar(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match="is truncated, damaged or no tar"):
        load_picture(tmp_path / "x.tar" / "a.png")


def test_compressed(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", ("a.png", picture()))
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(InputError, match=r"is compressed: unpack it to a plain tar first"):
        members_of(tar)


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png", "C:\\a.png", "a/.."]
)
def test_a_member_that_would_lie_outside(name: str, tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", (name, picture()))
    with pytest.raises(InputError, match="would lie outside of it"):
        members_of(tar)


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar = write(tmp_path / f"{number}.tar", (info, b""))
        with pytest.raises(InputError, match=r"a\.png is a link, a device or sparse"):
            members_of(tar)
    folder = tarfile.TarInfo("inner")
    folder.type = tarfile.DIRTYPE
    tar = write(tmp_path / "x.tar", (folder, b""), ("inner/a.png", picture()))
    assert list(members_of(tar)) == ["inner/a.png"]


def test_twice_and_empty(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", ("a.png", picture()), ("./a.png", picture(1)))
    with pytest.raises(InputError, match=r"has a\.png twice"):
        members_of(tar)
    tar = write(tmp_path / "y.tar", ("a.png", b""), ("b.png", picture()))
    with pytest.raises(InputError, match=r"a\.png is empty"):
        load_picture(tar / "a.png")
