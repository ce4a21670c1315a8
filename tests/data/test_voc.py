"""Pascal VOC's XML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm.data.voc import read_voc
from minivlm.errors import InputError

SIZE = "<size><width>100</width><height>50</height><depth>3</depth></size>"


def thing(name: str = "cat", box: tuple[object, ...] = (11, 11, 60, 40), more: str = "") -> str:
    edges = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inside = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
    return f"<object><name>{name}</name>{more}<bndbox>{inside}</bndbox></object>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "VOC"
    save_pictures(folder / "JPEGImages", "a.jpg", "b.jpg")
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    return folder


def write(folder: Path, name: str, inside: str, file: str | None = None) -> None:
    content = f"<annotation><filename>{file or name + '.jpg'}</filename>{inside}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(content, encoding="utf-8")


def converted(folder: Path, split: str | None = None, images: Path | None = None, **wishes: Any) -> Any:
    out = folder.parent / "out.jsonl"
    out.unlink(missing_ok=True)
    return lines_of(read_voc(folder, split, images), out, **wishes)


def test_boxes(folder: Path) -> None:
    """The first pixel is number 1, and the last one belongs to the box. Classes are sorted by name."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><difficult>1</difficult>"
    write(folder, "a", SIZE + thing("кот", (11, 11, 60, 40), part) + thing("bird", (1, 1, 100, 50)))
    write(folder, "b", SIZE)
    lines, report = converted(folder, empty_answer="none")
    assert lines == [
        {
            "image": "VOC/JPEGImages/a.jpg",
            "prefix": "detect bird ; кот",
            "suffix": f"<loc0000><loc0000><loc1023><loc1023> bird ; {BOX} кот",
        },
        {"image": "VOC/JPEGImages/b.jpg", "prefix": "detect bird ; кот", "suffix": "none"},
    ]
    assert not report.bad


def test_a_box_of_one_pixel_has_an_area(folder: Path) -> None:
    write(folder, "a", thing(box=(50, 25, 50, 25)))
    assert converted(folder)[0][0]["suffix"] == "<loc0491><loc0501><loc0512><loc0512> cat"


def test_parts(folder: Path) -> None:
    write(folder, "a", thing())
    write(folder, "b", thing())
    (folder / "ImageSets" / "Main" / "val.txt").write_text("b  1\nc -1\n")
    lines, report = converted(folder, "val")
    assert [line["image"] for line in lines] == ["VOC/JPEGImages/b.jpg"]
    assert "cannot be read (No such file" in reasons(report)["c.xml"]
    with pytest.raises(InputError, match=r"test.txt cannot be read \(.*expected the names of the pictures"):
        converted(folder, "test")


def test_files_of_labeling_programs(tmp_path: Path) -> None:
    """Beside the pictures, with a name that lacks its ending or is that of another machine's copy."""
    save_pictures(tmp_path / "set", "a.jpg", "b.png")
    (tmp_path / "set" / "Annotations").mkdir()
    write(tmp_path / "set", "a", thing(), "a")
    write(tmp_path / "set", "b", thing(), "before.png")
    lines, _ = converted(tmp_path / "set", images=tmp_path / "set")
    assert [line["image"] for line in lines] == ["set/a.jpg", "set/b.png"]
    for path in (tmp_path / "set" / "Annotations").glob("*.xml"):
        path.rename(tmp_path / "set" / path.name)
    (tmp_path / "set" / "Annotations").rmdir()
    assert converted(tmp_path / "set")[0] == lines


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (thing(""), "an object has no name"),
        (thing(box=(11, 11, 10, 40)), "the box of 'cat' has no area"),
        (thing(box=(11, 11, "", 40)), "the box of 'cat' is .* expected 4 numbers"),
        ("<object><name>cat</name></object>", "the box of 'cat' is .* expected 4 numbers"),
        (thing(box=(111, 11, 160, 40)), "lies outside"),
        ("<size><width>x</width><height>2</height></size>", "its size is"),
        ("<size><width>7</width><height>2</height></size>" + thing(), "about 7 x 2 pixels"),
        ("</oops>", "is not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>', "declares entities"),
    ],
)
def test_bad_annotations(inside: str, message: str, folder: Path) -> None:
    write(folder, "a", thing())
    write(folder, "b", inside)
    lines, report = converted(folder)
    assert [line["image"] for line in lines] == ["VOC/JPEGImages/a.jpg"]
    assert reasons(report).keys() == {"b.xml"}
    with pytest.raises(InputError, match=message):
        raise InputError(report.bad[0].reason)


@pytest.mark.parametrize("file", ["/etc/hostname", "../Annotations/a.xml", "gone.jpg"])
def test_bad_names(file: str, folder: Path) -> None:
    write(folder, "a", thing())
    write(folder, "z", thing(), file)
    _, report = converted(folder)
    assert ("no such file" if file == "gone.jpg" else "leads out of") in reasons(report)["z.xml"]


def test_a_size_of_nothing_is_not_known(folder: Path) -> None:
    write(folder, "a", "<size><width>0</width><height>0</height></size>" + thing())
    assert converted(folder)[0][0]["suffix"] == f"{BOX} cat"


def test_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no XML files: name the folder of a Pascal VOC data set"):
        read_voc(tmp_path)
