"""COCO's JSON: boxes, polygons, run lengths, captions, and all that may be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm.data.coco import read_coco
from minivlm.data.converting import BadPictures
from minivlm.errors import InputError

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "собака"}]
IMAGE = {"id": 1, "file_name": "a.png", "width": 100, "height": 50}
CAT = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 30]}
SQUARE = [[10, 10, 60, 10, 60, 40, 10, 40]]
PROMPT = "detect cat ; собака"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pictures(tmp_path / "photos", "a.png", "b.png", "猫 и.png")
    return tmp_path


def write(folder: Path, images: list[Any], annotations: list[Any], categories: Any = CATEGORIES) -> Path:
    path = folder / "in.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def converted(folder: Path, images: list[Any], annotations: list[Any], **wishes: Any) -> tuple[Any, Any]:
    categories = wishes.pop("categories", CATEGORIES)
    source = read_coco(write(folder, images, annotations, categories), folder / "photos")
    return lines_of(source, folder / "out.jsonl", **wishes)


def test_boxes(folder: Path) -> None:
    """By class, as the file has them, then from left to right; a second file has no objects."""
    others = [
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 25]},
        {"image_id": 1, "category_id": 7, "bbox": [5, 25, 200, 25]},  # reaches out of the picture: cut off
    ]
    lines, report = converted(
        folder, [IMAGE, IMAGE | {"id": 2, "file_name": "b.png"}], [*others, CAT], empty_answer="none"
    )
    left = "<loc0512><loc0051><loc1023><loc1023>"
    dog = "<loc0000><loc0000><loc0512><loc0512>"
    assert lines == [
        {"image": "photos/a.png", "prefix": PROMPT, "suffix": f"{left} cat ; {BOX} cat ; {dog} собака"},
        {"image": "photos/b.png", "prefix": PROMPT, "suffix": "none"},
    ]
    assert (report.lines, report.pictures, report.bad) == (2, 2, [])
    assert report.objects == {"cat": 2, "собака": 1}


def test_pictures_without_objects_are_left_out_unless_there_is_a_word(folder: Path) -> None:
    lines, report = converted(folder, [IMAGE, IMAGE | {"id": 2, "file_name": "b.png"}], [CAT])
    assert len(lines) == 1
    assert report.left_out == {"pictures without objects": 1}
    (folder / "out.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"everything was left out: 1 pictures without objects.*--empty-answer"
    ):
        converted(folder, [IMAGE], [])
    assert not (folder / "out.jsonl").exists()


def test_what_is_asked_for(folder: Path) -> None:
    annotations = [CAT, CAT | {"image_id": 2, "category_id": 3}]
    images = [IMAGE, IMAGE | {"id": 2, "file_name": "b.png"}, IMAGE | {"id": 3, "file_name": "猫 и.png"}]

    def prompts(**wishes: Any) -> list[tuple[str, str]]:
        (folder / "out.jsonl").unlink(missing_ok=True)
        lines, _ = converted(folder, images, annotations, empty_answer="none", **wishes)
        assert lines[2]["image"] == "photos/猫 и.png"
        return [(line["prefix"], line["suffix"].rpartition(">")[2].strip()) for line in lines]

    assert prompts(ask="present") == [("detect cat", "cat"), ("detect собака", "собака"), (PROMPT, "none")]
    assert prompts(classes=("собака",)) == [
        ("detect собака", "none"), ("detect собака", "собака"), ("detect собака", "none"),
    ]  # fmt: skip
    assert [one for one, _ in prompts(classes=("собака", "cat"))] == ["detect собака ; cat"] * 3
    assert {one for one, _ in prompts(prompt="where {is} {classes}?")} == {"where {is} cat ; собака?"}
    with pytest.raises(InputError, match=r"there is no class 'dog': choose from cat, собака"):
        prompts(classes=("dog",))


def test_crowds_are_not_objects(folder: Path) -> None:
    """A region of many cats is no cat, and its picture is not empty either."""
    crowd = CAT | {"iscrowd": 1, "segmentation": {"size": [50, 100], "counts": [5000]}}
    images = [IMAGE, IMAGE | {"id": 2, "file_name": "b.png"}]
    lines, report = converted(folder, images, [crowd, CAT, crowd | {"image_id": 2}], empty_answer="none")
    assert [line["suffix"] for line in lines] == [f"{BOX} cat"]
    assert report.left_out == {"crowds": 2, "pictures with nothing but crowds": 1}


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        {"size": [50, 100], "counts": [510, 30, *[20, 30] * 49, 2010]},
        "compressed",
    ],
)
def test_shapes(folder: Path, segmentation: Any) -> None:
    """Polygons and both kinds of run lengths give the same words, with or without a box."""
    if segmentation == "compressed":
        coco = pytest.importorskip("pycocotools.mask")
        segmentation = coco.merge(coco.frPyObjects(SQUARE, 50, 100))
        segmentation["counts"] = segmentation["counts"].decode()
    full = "".join(f"<seg{code:03}>" for code in FULL)
    for annotation in (CAT, {key: value for key, value in CAT.items() if key != "bbox"}):
        (folder / "out.jsonl").unlink(missing_ok=True)
        lines, _ = converted(folder, [IMAGE], [annotation | {"segmentation": segmentation}], task="segment")
        assert lines == [
            {"image": "photos/a.png", "prefix": "segment cat ; собака", "suffix": f"{BOX}{full} cat"}
        ]


FULL = [88, 36, 36, 47, 103, 91, 91, 111, 103, 91, 91, 111, 61, 31, 31, 31]  # of a mask that fills its box


def test_segmenting_needs_shapes(folder: Path) -> None:
    with pytest.raises(BadPictures, match=r"a.png: an object of the class 'cat' has a box but no shape"):
        converted(folder, [IMAGE], [CAT], task="segment")


def test_captions(folder: Path) -> None:
    annotations = [{"image_id": 1, "caption": text} for text in ("Eine Katze.\n", "a cat", "a cat")]
    lines, report = converted(folder, [IMAGE], annotations)
    assert lines == [{"image": "photos/a.png", "prefix": "caption en", "suffix": "Eine Katze."}]
    assert report.left_out == {"further answers to the same prompt": 1}
    (folder / "out.jsonl").unlink()
    lines, _ = converted(folder, [IMAGE], annotations, every_answer=True, prompt="caption de")
    assert [(line["prefix"], line["suffix"]) for line in lines] == [
        ("caption de", "Eine Katze."), ("caption de", "a cat"),
    ]  # fmt: skip
    (folder / "out.jsonl").unlink()
    lines, _ = converted(folder, [IMAGE], annotations, task="pairs")
    assert lines == [{"image": "photos/a.png", "text": "Eine Katze."}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [10, 10, 0, 30]}, "the box of 'cat' has no area: x0, y0, x1, y1 are 10, 10, 10, 40"),
        ({"bbox": [10, 10, 5, -30]}, "has no area"),
        ({"bbox": [200, 10, 5, 30]}, "lies outside the picture of 100 x 50"),
        ({"bbox": [10, 10, 50]}, r"a box is \[10, 10, 50\]: expected 4 numbers"),
        ({"bbox": [10, 10, 50, float("nan")]}, "expected 4 numbers"),
        ({"bbox": "10 10 50 30"}, "expected 4 numbers"),
        ({"bbox": [10, 10, 50, None]}, "expected 4 numbers"),
        ({"bbox": []}, "has neither a box nor a shape"),
        ({"category_id": 8}, "an object has the category 8, which the file does not list"),
        ({"category_id": None}, "the category null"),
        ({"category_id": 5}, "the category 5, which has no name"),
        ({"segmentation": [[1, 2, 3, 4]]}, "a polygon has 4 numbers"),
        ({"segmentation": [7]}, "a polygon is 7"),
        ({"segmentation": {"size": [50, 100], "counts": "4T"}}, "ends inside a number"),
        ({"segmentation": {"size": [50], "counts": "4"}}, "the size of a mask is"),
        ({"segmentation": {"size": [50, 100], "counts": None}}, "the runs of a mask is None"),
        ({"segmentation": 5}, "a shape is 5"),
    ],
)
def test_bad_objects_make_their_picture_bad(change: dict[str, Any], message: str, folder: Path) -> None:
    images = [IMAGE, IMAGE | {"id": 2, "file_name": "b.png"}]
    categories = [*CATEGORIES, {"id": 5}]
    lines, report = converted(
        folder, images, [CAT, CAT | change, CAT | {"image_id": 2}], categories=categories
    )
    assert [line["image"] for line in lines] == ["photos/b.png"]
    assert reasons(report).keys() == {"a.png"}
    with pytest.raises(InputError, match=message):
        raise InputError(report.bad[0].reason)


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        (IMAGE | {"file_name": "gone.png"}, "gone.png", "gone.png: no such file"),
        (IMAGE | {"file_name": "cut.png"}, "cut.png", "truncated or damaged|not a picture"),
        (IMAGE | {"file_name": "/etc/hostname"}, "/etc/hostname", "leads out of .*photos: choose the folder"),
        (IMAGE | {"file_name": "../secret.png"}, "../secret.png", "leads out of"),
        (IMAGE | {"file_name": "x/../../secret.png"}, "x/../../secret.png", "leads out of"),
        (IMAGE | {"file_name": ""}, "", 'its picture is "": expected the name of a file'),
        ({"id": 1, "width": 1, "height": 1}, "1", "its picture is null"),
        (IMAGE | {"width": 50, "height": 100}, "a.png", "about 50 x 100 pixels, but it has 100 x 50"),
        (IMAGE | {"width": "wide"}, "a.png", "its size is"),
        ({"file_name": "a.png"}, "{'file_name': 'a.png'}", "it has no id"),
        ("a.png", "a.png", "it has no id"),
        (IMAGE | {"id": 2, "file_name": "b.png"}, "b.png", "the id 2 is given to two pictures"),
    ],
)  # fmt: skip
def test_bad_pictures_are_named(image: Any, name: str, message: str, folder: Path) -> None:
    content = (folder / "photos" / "a.png").read_bytes()
    (folder / "photos" / "cut.png").write_bytes(content[: len(content) // 2])
    save_pictures(folder, "secret.png")
    good = IMAGE | {"id": 2, "file_name": "猫 и.png"}
    annotations = [CAT | {"image_id": 2}, CAT]
    lines, report = converted(folder, [good, image], annotations)
    assert [line["image"] for line in lines] == ["photos/猫 и.png"]
    assert name in reasons(report)
    with pytest.raises(InputError, match=message):
        raise InputError(reasons(report)[name])


def test_annotations_of_no_picture(folder: Path) -> None:
    _, report = converted(folder, [IMAGE], [CAT, CAT | {"image_id": 9}, CAT | {"image_id": [1]}, "x"])
    assert reasons(report) == {
        "picture 9": "it has 1 annotations, but is not in the file",
        "picture None": "it has 2 annotations, but is not in the file",
    }


def test_a_picture_that_is_listed_twice_is_written_once(folder: Path) -> None:
    """As in files that were merged."""
    again = IMAGE | {"id": 2, "file_name": "./a.png"}
    other = {"image_id": 2, "category_id": 3, "bbox": [0, 0, 50, 25]}
    lines, _ = converted(folder, [IMAGE, again], [CAT, other, CAT | {"image_id": 2}])
    assert [line["suffix"] for line in lines] == [f"{BOX} cat ; <loc0000><loc0000><loc0512><loc0512> собака"]


@pytest.mark.parametrize("name", ["cat; dog", "<loc0001>", "a <seg001> b"])
def test_names_that_would_end_an_object(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match="as its name, which separate objects in an answer: rename it"):
        converted(folder, [IMAGE], [CAT], categories=[{"id": 7, "name": name}])


def test_names_of_several_lines(folder: Path) -> None:
    lines, _ = converted(folder, [IMAGE], [CAT], categories=[{"id": 7, "name": " two\n words "}])
    assert lines[0]["prefix"] == "detect two words"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", 'has no lists "images" and "annotations"'),
        (b'{"images": []}', "has no lists"),
        (b'{"images": [], "annotations": {}}', "has no lists"),
        (b'{"images": "\xff"}', "byte 13 is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"images": [], "annotations": []}', "there are no pictures in it"),
    ],
)
def test_files_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        lines_of(read_coco(tmp_path / "in.json"), tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"missing.json cannot be read \(No such file"):
        read_coco(tmp_path / "missing.json")


@pytest.mark.parametrize("turn", [1, 6, 8])
def test_turned_pictures(turn: int, folder: Path) -> None:
    """What numbers refer to is what the size in the file says. A stored picture of 100 x 50 pixels."""
    save_pictures(folder / "photos", "t.png", turn=turn)
    image = IMAGE | {"file_name": "t.png"}

    def suffix(width: int, height: int, **wishes: Any) -> str:
        (folder / "out.jsonl").unlink(missing_ok=True)
        annotations = [CAT | {"segmentation": SQUARE}]
        lines, _ = converted(folder, [image | {"width": width, "height": height}], annotations, **wishes)
        return str(lines[0]["suffix"])

    # Shares of the stored picture: x .1 to .6, y .2 to .8
    about_stored = {
        1: BOX,
        6: "<loc0102><loc0205><loc0614><loc0818>",  # y is x; x is 1 - y
        8: "<loc0409><loc0205><loc0921><loc0818>",  # y is 1 - x; x is y
    }
    assert suffix(100, 50) == f"{about_stored[turn]} cat"
    assert suffix(100, 50, task="segment").startswith(about_stored[turn])
    assert suffix(100, 50, frame="upright") == f"{BOX} cat"  # as Label Studio writes sizes
    if turn != 1:
        about_upright = "<loc0102><loc0205><loc0409><loc1023>"  # 10, 10, 60, 40 in 50 x 100, cut off
        assert suffix(50, 100) == f"{about_upright} cat"
