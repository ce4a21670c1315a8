"""Folders that are named like what their pictures show."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_pictures import lines_of, reasons, save_pictures

from minivlm.data.class_folders import read_class_folders
from minivlm.errors import InputError


def test_the_first_folder_is_the_answer(tmp_path: Path) -> None:
    save_pictures(tmp_path / "set", "猫/1.png", "a dog/sub/2.jpg", "a dog/.hidden.png", ".cache/3.png")
    (tmp_path / "set" / "a dog" / "notes.txt").write_text("no picture")
    lines, report = lines_of(read_class_folders(tmp_path / "set"), tmp_path / "out.jsonl")
    assert lines == [
        {"image": "set/a dog/sub/2.jpg", "prefix": "what is it?", "suffix": "a dog"},
        {"image": "set/猫/1.png", "prefix": "what is it?", "suffix": "猫"},
    ]
    assert report.bad == []
    lines, _ = lines_of(
        read_class_folders(tmp_path / "set"), tmp_path / "other" / "out.jsonl", prompt="which of {classes}?"
    )
    assert lines[0]["prefix"] == "which of a dog ; 猫?"
    assert lines[0]["image"] == "../set/a dog/sub/2.jpg"


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    save_pictures(tmp_path / "set", "cat/1.png", "lost.png")
    (tmp_path / "set" / "cat" / "2.png").touch()
    lines, report = lines_of(read_class_folders(tmp_path / "set"), tmp_path / "out.jsonl")
    assert len(lines) == 1
    assert reasons(report).keys() == {"lost.png", "cat/2.png"}
    assert reasons(report)["lost.png"] == "it lies in no folder of a class"
    assert "is empty: copy or download" in reasons(report)["cat/2.png"]


def test_no_folders(tmp_path: Path) -> None:
    save_pictures(tmp_path, "1.png")
    with pytest.raises(InputError, match="has no folders with pictures: expected one for each class"):
        read_class_folders(tmp_path)
    with pytest.raises(InputError, match="missing is not a folder"):
        read_class_folders(tmp_path / "missing")
