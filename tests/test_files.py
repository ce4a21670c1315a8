"""A file is either the old one or the new one, whatever happens in between."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minivlm.errors import InputError
from minivlm.files import check_output, write_aside


def test_the_new_file_appears_at_the_end_of_the_block(tmp_path: Path):
    path = tmp_path / "deep" / "folder" / "a.json"
    with write_aside(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across disks would be a copy
    assert path.read_text() == "first"
    with write_aside(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyError

    with pytest.raises(KeyError), write_aside(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.fixture
def small_disk():
    """Files of this process may not exceed 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["python", "safetensors"])
@pytest.mark.usefixtures("small_disk")
def test_a_write_that_fails_half_way(tmp_path: Path, writer: str):
    path = tmp_path / "a.bin"
    path.write_text("old")

    def write(temporary: Path) -> None:
        if writer == "python":
            temporary.write_bytes(bytes(5000))
        else:
            save_file({"x": torch.zeros(5000)}, temporary)

    message = "cannot write .*a.bin.*File too large.* unchanged. Free some space"
    with pytest.raises(InputError, match=message), write_aside(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_is_named(tmp_path: Path):
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="No space left on device"), write_aside(tmp_path / "a"):
        write()
    assert os.listdir(tmp_path) == []


def test_the_folders_name_is_taken_by_a_file(tmp_path: Path):
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match=r"cannot write .*runs/a"), write_aside(tmp_path / "runs" / "a"):
        pytest.fail("the block must not run")


def test_the_file_is_readable_like_any_other(tmp_path: Path):
    (tmp_path / "plain").touch()
    with write_aside(tmp_path / "aside") as temporary:
        temporary.touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "aside")]
    assert modes[0] == modes[1]


def test_whoever_reads_the_old_file_keeps_it(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        with write_aside(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_everything_is_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new))[1])
    with write_aside(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert events == ["sync", "rename", "sync"]  # the content, then the name, then the folder's list of names


def test_a_safetensors_file_is_readable_like_any_other(tmp_path: Path):
    with write_aside(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    with write_aside(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


# What may be written to


def special(path: Path, kind: str) -> Path:
    """Something that is no regular file."""
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes device nodes")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(special(path.with_name("device"), "device"))
    return path


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "link to a device", "loop"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str):
    """A rename would put a file where the device was."""
    path = special(tmp_path / "null", kind)
    before = {name: os.lstat(tmp_path / name).st_mode for name in os.listdir(tmp_path)}
    with pytest.raises(InputError, match=r"null"), write_aside(path):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match=r"null"):
        check_output(path)
    assert {name: os.lstat(tmp_path / name).st_mode for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, exists: bool):
    """What it leads to is written, also in another folder."""
    target, link = tmp_path / "there" / "a.txt", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    if exists:
        target.write_text("old")
    check_output(link)
    with write_aside(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.txt"]


@pytest.mark.parametrize("name", ["photo.jpg", "../pictures/photo.jpg", "link.jpg", "hard.jpg"])
def test_an_input_is_no_output(tmp_path: Path, name: str):
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo = folder / "photo.jpg"
    photo.write_bytes(b"photo")
    (folder / "link.jpg").symlink_to("photo.jpg")
    os.link(photo, folder / "hard.jpg")
    with pytest.raises(InputError, match="is read here, and would be overwritten: choose another name"):
        check_output(folder / name, ["missing.jpg", photo])
    check_output(folder / "other.jpg", [photo])


def test_what_exists_stays_where_it_is_to_stay(tmp_path: Path):
    (tmp_path / "a.npz").touch()
    check_output(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a.npz exists, and would be overwritten"):
        check_output(tmp_path / "a.npz", replace=False)


def test_a_folder_is_looked_at_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_output(tmp_path / "new" / "folder" / "a")
    assert os.listdir(tmp_path) == []  # nothing is made yet
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder"):
        check_output(tmp_path / "file" / "folder" / "a")
    monkeypatch.setattr(os, "access", lambda *rest: False)  # root may write anywhere
    with pytest.raises(InputError, match="may not be written into"):
        check_output(tmp_path / "new" / "a")


@pytest.mark.parametrize("letter", ["a", "\N{HIRAGANA LETTER A}"])
def test_the_longest_names(tmp_path: Path, letter: str):
    """255 bytes are a name; more are refused by name."""
    longest = letter * (255 // len(letter.encode()))
    with write_aside(tmp_path / longest) as temporary:
        temporary.write_text("a")
    assert os.listdir(tmp_path) == [longest]
    with pytest.raises(InputError, match="File name too long"), write_aside(tmp_path / (longest + letter)):
        pytest.fail("the block must not run")
