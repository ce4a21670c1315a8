"""CSV files: captions, questions and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm.data.tables import read_table
from minivlm.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pictures(tmp_path / "photos", "a.png", "b.png", "é.png")
    return tmp_path


def converted(folder: Path, text: str, columns: dict[str, str] | None = None, **wishes: Any) -> Any:
    (folder / "in.csv").write_bytes(text.encode())
    (folder / "out.jsonl").unlink(missing_ok=True)
    return lines_of(read_table(folder / "in.csv", folder / "photos", columns), folder / "out.jsonl", **wishes)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_captions(separator: str, end: str, folder: Path) -> None:
    rows = [
        ("image", "Caption"),
        ("a.png", '"a cup, of\ntea; ""hot"""'),
        (),
        ("é.png", "où\u2028?"),
        ("a.png", "b"),
    ]
    text = "\ufeff" + end.join(separator.join(row) for row in rows)
    lines, report = converted(folder, text)
    assert lines == [
        {"image": "photos/a.png", "prefix": "caption en", "suffix": 'a cup, of\ntea; "hot"'},
        {"image": "photos/é.png", "prefix": "caption en", "suffix": "où\u2028?"},
    ]
    assert report.left_out == {"further answers to the same prompt": 1}


def test_questions(folder: Path) -> None:
    """Each is a line; the same one twice is not."""
    text = "image,question,answer\na.png,what?,a cup\na.png,where?,here\na.png,what?,a cup\n"
    lines, report = converted(folder, text)
    assert [(line["prefix"], line["suffix"]) for line in lines] == [("what?", "a cup"), ("where?", "here")]
    assert (report.lines, report.pictures, report.left_out) == (2, 1, {})


def test_boxes(folder: Path) -> None:
    """One row for each object; an empty box is a picture without objects."""
    text = (
        "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        "a.png,100,50,dog,0,0,50,25\nb.png,100,50,,,,,\na.png,100,50,cat,10,10,60,40\n"
        "a.png,100,50,cat,10,10,60,40\n"
    )
    lines, _ = converted(folder, text, empty_answer="none")
    assert lines == [
        {
            "image": "photos/a.png",
            "prefix": "detect cat ; dog",
            "suffix": f"{BOX} cat ; <loc0000><loc0000><loc0512><loc0512> dog",
        },
        {"image": "photos/b.png", "prefix": "detect cat ; dog", "suffix": "none"},
    ]
    without_sizes = "\n".join(
        ",".join(row.split(",")[::3][:1] + row.split(",")[3:]) for row in text.split("\n")
    )
    assert converted(folder, without_sizes, empty_answer="none")[0] == lines


def test_columns_of_other_names(folder: Path) -> None:
    text = "id,Bild,Text\n1,a.png,eine Tasse\n"
    lines, _ = converted(folder, text, {"image": "Bild", "answer": "Text"})
    assert lines[0]["suffix"] == "eine Tasse"
    with pytest.raises(InputError, match=r"has no column 'Datei': choose from id, Bild, Text"):
        converted(folder, text, {"image": "Datei"})
    with pytest.raises(InputError, match=r"--columns x=Bild: a column can be image, prompt, answer"):
        converted(folder, text, {"x": "Bild"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\), and none with pictures"),
        ("a,b\n1,2\n", "has the columns a, b, and none with pictures: name it, as in --columns image=FILE"),
        ("image,b\n1,2\n", "none with answers or boxes"),
        ("image,xmin,ymin,xmax,ymax\n", "has boxes without a class"),
        ("image,text\n", "there are no pictures in it"),
    ],
)
def test_tables_that_are_none(text: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message):
        converted(folder, text)
    with pytest.raises(InputError, match="cannot be read"):
        read_table(folder / "missing.csv")
    (folder / "in.csv").write_bytes("image,text\na.png,é\n".encode("latin-1"))
    with pytest.raises(InputError, match="byte 18 is not UTF-8"):
        read_table(folder / "in.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b.png", "it has 1 fields: expected 6, as the first line"),
        ("b.png,cat,1,2,3,4,5", "it has 7 fields"),
        ("b.png,,10,10,60,40", "an object has no class"),
        ("b.png,cat,10,10,60,", "the box of 'cat' is .* expected 4 numbers"),
        ("b.png,cat,10,10,10,40", "has no area"),
        ("gone.png,cat,10,10,60,40", "no such file"),
        ("/etc/hostname,cat,10,10,60,40", "leads out of"),
        ("../in.csv,cat,10,10,60,40", "leads out of"),
        (",cat,10,10,60,40", "its picture is"),
        ('"b".png,cat,10,10,60,40', "cannot be read .*: check its quotes"),
    ],
)
def test_bad_rows(row: str, message: str, folder: Path) -> None:
    text = f"image,class,xmin,ymin,xmax,ymax\n{row}\na.png,cat,10,10,60,40\n"
    lines, report = converted(folder, text)
    assert [line["image"] for line in lines] == ["photos/a.png"]
    assert len(report.bad) == 1
    with pytest.raises(InputError, match=message):
        raise InputError(report.bad[0].reason)


def test_one_bad_row_makes_its_picture_bad(folder: Path) -> None:
    """Its answer would leave out an object."""
    text = "image,class,xmin,ymin,xmax,ymax\na.png,cat,10,10,60,40\na.png,,1,1,2,2\nb.png,cat,10,10,60,40\n"
    lines, report = converted(folder, text)
    assert [line["image"] for line in lines] == ["photos/b.png"]
    assert reasons(report) == {"line 3": "an object has no class"}


def test_absolute_paths_inside_the_folder_are_fine(folder: Path) -> None:
    lines, report = converted(folder, f"image,text\n{folder / 'photos' / 'a.png'},x\nsub\\..\\b.png,y\n")
    assert lines[0]["image"] == "photos/a.png"
    assert len(report.bad) <= 1  # the other one is a path on Windows only


def test_sizes_that_disagree(folder: Path) -> None:
    head = "image,width,height,class,xmin,ymin,xmax,ymax\n"
    rows = "a.png,100,50,cat,10,10,60,40\na.png,200,100,cat,10,10,60,40\nb.png,,,cat,10,10,60,40\n"
    _, report = converted(folder, head + rows)
    assert reasons(report) == {"a.png": "it appears 2 times, with different sizes: leave one of them"}
