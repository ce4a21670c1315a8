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
from minivlm.files import write_aside


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
