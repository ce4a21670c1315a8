"""YOLO's text files: boxes and polygons, where names and pictures are found, and what may be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm.data.yolo import label_of, read_yolo
from minivlm.errors import InputError

CAT = "0 0.35 0.5 0.5 0.6"  # 10, 10, 60, 40 in a picture of 100 x 50
POLYGON = "1 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        save_pictures(tmp_path / "set" / "images" / part, "a.png", "b.png")
        labels = tmp_path / "set" / "labels" / part
        labels.mkdir(parents=True)
        (labels / "a.txt").write_text(f"{CAT}\r\n\n{POLYGON}\n")
    (tmp_path / "set" / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: [images/val]\nnames:\n  0: cat\n  1: собака\n", encoding="utf-8"
    )
    return tmp_path / "set"


def converted(source: Path, *arguments: Any, images: Path | None = None, **wishes: Any) -> Any:
    out = source.parent / "out.jsonl"
    out.unlink(missing_ok=True)
    names = wishes.pop("names", None)
    return lines_of(read_yolo(source, *arguments, images=images, names=names), out, **wishes)


def test_boxes_and_polygons(folder: Path) -> None:
    lines, report = converted(folder, "train", empty_answer="none")
    assert lines == [
        {
            "image": "set/images/train/a.png",
            "prefix": "detect cat ; собака",
            "suffix": f"{BOX} cat ; {BOX} собака",
        },
        {"image": "set/images/train/b.png", "prefix": "detect cat ; собака", "suffix": "none"},
    ]
    assert report.bad == []
    (folder / "labels" / "train" / "a.txt").write_text(POLYGON)
    lines, _ = converted(folder, "train", task="segment")
    assert lines[0]["suffix"].startswith(f"{BOX}<seg088>")


def test_parts(folder: Path) -> None:
    images = lambda *arguments, **more: [line["image"] for line in converted(folder, *arguments, **more)[0]]  # noqa: E731
    assert images("val") == ["set/images/val/a.png"]
    save_pictures(folder, "runs/curves.png")
    assert [len(converted(folder, empty_answer="none")[0])] == [4]
    assert images() == ["set/images/train/a.png", "set/images/val/a.png"]
    assert images(images=folder / "images" / "val") == ["set/images/val/a.png"]
    with pytest.raises(InputError, match=r"has no part 'test': choose from train, val"):
        converted(folder, "test")


@pytest.mark.parametrize("said", ["../images/train", "images/train", "train.txt"])
def test_where_a_part_may_be_said_to_be(said: str, folder: Path) -> None:
    """As in files that Roboflow writes, which name a folder beside the one that holds them; or as a list."""
    (folder / "data.yaml").write_text(f"train: {said}\nnames: [cat, dog]\n")
    (folder / "train.txt").write_text("./images/train/a.png\n\n../../secret.png\n")
    lines, report = converted(folder / "data.yaml", "train")
    assert [line["prefix"] for line in lines] == ["detect cat ; dog"]
    assert len(report.bad) == (said == "train.txt")
    assert not report.bad or "leads out of" in reasons(report)["../../secret.png"]


def test_a_part_that_is_not_there(folder: Path) -> None:
    (folder / "data.yaml").write_text("path: ../elsewhere\ntrain: gone\nnames: [cat, dog]\n")
    with pytest.raises(InputError, match="names gone, which is not there"):
        converted(folder, "train")


def test_names_in_a_text_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which needs no other package."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match=r"yaml is not installed, but comes with the extra \[yolo\]"):
        converted(folder)
    (folder / "names.txt").write_text("猫\ndog\n", encoding="utf-8")
    lines, _ = converted(folder, names=folder / "names.txt")
    assert lines[0]["prefix"] == "detect 猫 ; dog"
    (folder / "names.txt").rename(folder / "classes.txt")
    (folder / "data.yaml").unlink()
    assert converted(folder)[0] == lines
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"has neither a data.yaml nor a classes.txt: .* with --names"):
        converted(folder)


def test_labels_beside_the_pictures(tmp_path: Path) -> None:
    save_pictures(tmp_path / "set", "a.png")
    (tmp_path / "set" / "a.txt").write_text(CAT)
    (tmp_path / "set" / "classes.txt").write_text("cat")
    lines, _ = converted(tmp_path / "set")
    assert lines == [{"image": "set/a.png", "prefix": "detect cat", "suffix": f"{BOX} cat"}]
    assert label_of(Path("images/x/images/y/a.b.jpg")) == Path("images/x/labels/y/a.b.txt")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("0 0.5 0.5 0 0.2", "the box of 'cat' has no area"),
        ("0 1.5 0.5 0.1 0.2", "the box of 'cat' lies outside the picture of 1 x 1"),
        ("0 50 25 10 10", "its labels have 50: expected shares from 0 to 1, not pixels"),
        ("2 0.5 0.5 0.1 0.1", "the class 2, which has no name"),
        ("-1 0.5 0.5 0.1 0.1", "the class '-1': expected a whole number"),
        ("cat 0.5 0.5 0.1 0.1", "the class 'cat': expected a whole number"),
        ("0 0.5 0.5 0.1", "a line of its labels has 3 numbers: expected 4, or 6 and more"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 5 numbers"),
        ("0", "has 0 numbers"),
        ("0 0.5 0.5 nan 0.1", "expected a list of numbers"),
        ("0 0.5 0.5 wide 0.1", "expected a list of numbers"),
        ("0 \ud800", "is not UTF-8"),
    ],
)
def test_bad_labels(label: str, message: str, folder: Path) -> None:
    path = folder / "labels" / "train" / "b.txt"
    path.write_bytes(label.encode("utf-8", "surrogatepass"))
    lines, report = converted(folder, "train")
    assert [line["image"] for line in lines] == ["set/images/train/a.png"]
    assert reasons(report).keys() == {"images/train/b.png"}
    with pytest.raises(InputError, match=message):
        raise InputError(report.bad[0].reason)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [cat", "is not YAML"),
        ("- cat", "has no names: expected the data.yaml"),
        ("path: .", "has no names: expected a list"),
        ("names: {cat: 0}", "has no names"),
        ("names: [cat, no]", "has the name False, which is no text in YAML: put it in quotes"),
    ],
)
def test_bad_descriptions(content: str, message: str, folder: Path) -> None:
    (folder / "data.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        converted(folder)


def test_boxes_are_about_the_upright_picture(folder: Path) -> None:
    save_pictures(folder / "images" / "train", "a.png", turn=6)
    lines, _ = converted(folder, "train")
    assert lines[0]["suffix"].startswith(f"{BOX} cat")
    lines, _ = converted(folder, "train", frame="stored")
    assert lines[0]["suffix"].startswith("<loc0102><loc0205><loc0614><loc0818> cat")


def test_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classes.txt").write_text("cat")
    with pytest.raises(InputError, match="there are no pictures in it"):
        converted(tmp_path / "set")
    with pytest.raises(InputError, match=r"neither a data\.yaml"):
        converted(tmp_path / "missing")
