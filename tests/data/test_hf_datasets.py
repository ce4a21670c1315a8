"""What `datasets` has saved. It is large, so a stand-in has the part of it that is used.

The stand-in has the classes and calls of its documentation: load_from_disk, Dataset.features, cast_column
with Image(decode=False), ClassLabel.names, and lists as Sequence(feature) or List(feature).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm.data.hf_datasets import names_in, read_dataset
from minivlm.errors import InputError


class Picture:
    """datasets.Image"""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Several:
    """datasets.Sequence or datasets.List"""

    def __init__(self, feature: Any) -> None:
        self.feature = feature


class ClassLabel:
    """datasets.ClassLabel"""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class Dataset:
    """datasets.Dataset"""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows = features, rows

    def cast_column(self, name: str, feature: Any) -> Dataset:
        other = copy.copy(self)
        other.features = self.features | {name: feature}
        return other

    def __iter__(self) -> Iterator[dict[str, Any]]:
        decoded = [name for name, one in self.features.items() if isinstance(one, Picture) and one.decode]
        assert not decoded, "a picture would be decoded and written anew"
        return iter(self.rows)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What load_from_disk finds, by the name of the folder."""
    found: dict[str, Any] = {}

    def load_from_disk(path: str) -> Any:
        if Path(path).name not in found:
            raise FileNotFoundError(f"Directory {path} is neither a `Dataset` directory nor a `DatasetDict`")
        (tmp_path / "saved").mkdir(exist_ok=True)
        return found[Path(path).name]

    module = ModuleType("datasets")
    module.load_from_disk, module.Image = load_from_disk, Picture  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    (tmp_path / "saved").mkdir()
    save_pictures(tmp_path, "a.png", "b.jpg")
    return found


def picture(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": None}


def converted(folder: Path, *arguments: Any, **wishes: Any) -> Any:
    out = folder / "out.jsonl"
    out.unlink(missing_ok=True)
    return lines_of(read_dataset(folder / "saved", folder / "pictures", *arguments), out, **wishes)


def test_captions(saved: dict[str, Any], tmp_path: Path) -> None:
    """Pictures are written once, byte for byte, and again when it is done again."""
    features = {"image": Picture(), "caption": "text"}
    rows = [
        {"image": picture(tmp_path / "a.png"), "caption": "a cup"},
        {"image": picture(tmp_path / "b.jpg"), "caption": ["où ?", "où ?", "there"]},
        {"image": picture(tmp_path / "a.png"), "caption": "a red cup"},
    ]
    saved["saved"] = Dataset(features, rows)
    for _ in range(2):
        lines, report = converted(tmp_path)
        assert [(line["prefix"], line["suffix"]) for line in lines] == [
            ("caption en", "a cup"), ("caption en", "où ?"),
        ]  # fmt: skip
        first, second = (tmp_path / line["image"] for line in lines)
        assert (first.parent, first.suffix, second.suffix) == (tmp_path / "pictures", ".png", ".jpg")
        assert first.read_bytes() == (tmp_path / "a.png").read_bytes()
        assert second.read_bytes() == (tmp_path / "b.jpg").read_bytes()
        assert len(list((tmp_path / "pictures").iterdir())) == 2
        assert report.left_out == {"further answers to the same prompt": 2}


def test_classes(saved: dict[str, Any], tmp_path: Path) -> None:
    features = {"img": Picture(), "label": ClassLabel(["cat", "dog", ""])}
    rows = [{"img": picture(tmp_path / name), "label": n} for n, name in ((1, "a.png"), (-1, "b.jpg"))]
    saved["saved"] = {"train": Dataset(features, rows)}
    lines, report = converted(tmp_path, "train", prompt="one of {classes}?")
    assert [(line["prefix"], line["suffix"]) for line in lines] == [("one of cat ; dog?", "dog")]
    assert "the class -1, which has no name" in reasons(report)["row 1"]
    for split in (None, "test"):
        with pytest.raises(InputError, match="has the parts train: choose one with --split"):
            converted(tmp_path, split)
    saved["saved"] = saved["saved"]["train"]
    with pytest.raises(InputError, match="is one part, not several: leave out --split"):
        converted(tmp_path, "train")


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts", "sequence"])
def test_objects(form: str, saved: dict[str, Any], tmp_path: Path) -> None:
    """As different versions of datasets describe and return them."""
    label = ClassLabel(["cat", "собака"])
    inside = {"bbox": Several(Several("float")), "category": Several(label)}
    objects: Any = {"bbox": [[0, 0, 50, 25], [10, 10, 50, 30]], "category": [1, 0]}
    empty: Any = {"bbox": [], "category": []}
    feature: Any = inside
    if form != "dict of lists":
        feature = Several({"bbox": Several("float"), "category": label})
    if form == "list of dicts":
        objects = [{"bbox": [0, 0, 50, 25], "category": 1}, {"bbox": [10, 10, 50, 30], "category": 0}]
        feature, empty = [{"bbox": ["float"], "category": label}], []
    rows = [
        {"image": picture(tmp_path / "a.png"), "objects": objects},
        {"image": picture(tmp_path / "b.jpg"), "objects": empty},
    ]
    saved["saved"] = Dataset({"image": Picture(), "objects": feature}, rows)
    lines, _ = converted(tmp_path, empty_answer="none")
    assert [(line["prefix"], line["suffix"]) for line in lines] == [
        ("detect cat ; собака", f"{BOX} cat ; <loc0000><loc0000><loc0512><loc0512> собака"),
        ("detect cat ; собака", "none"),
    ]
    lines, _ = converted(tmp_path, None, None, "xyxy")  # other corners
    assert lines[0]["suffix"].startswith("<loc0205><loc0102><loc0614><loc0512> cat")


def test_columns(saved: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"scan": picture(tmp_path / "a.png"), "things": {"corners": [[1, 1, 2, 2]], "what": ["x"]}}]
    saved["saved"] = Dataset({"scan": Picture(), "things": {}}, rows)
    with pytest.raises(InputError, match="has the columns scan, things: say which has the pictures"):
        converted(tmp_path)
    said = {"image": "scan", "objects": "things", "box": "corners", "class": "what"}
    assert converted(tmp_path, None, said)[0][0]["prefix"] == "detect x"
    del said["box"]
    with pytest.raises(
        InputError, match=r"its objects have corners, what, and no box: say it, as in --columns"
    ):
        converted(tmp_path, None, said)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it has no picture"),
        ({"bytes": None, "path": None}, "it has no picture"),
        ({"bytes": b"text", "path": "a.png"}, "its picture is not a picture in a known format"),
        ({"bytes": None, "path": "/etc/hostname"}, "leads out of"),
        ({"bytes": None, "path": "gone.png"}, "no such file"),
    ],
)
def test_bad_pictures(value: Any, message: str, saved: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"image": picture(tmp_path / "a.png"), "text": "good"}, {"image": value, "text": "bad"}]
    saved["saved"] = Dataset({"image": Picture(), "text": "text"}, rows)
    lines, report = converted(tmp_path)
    assert [line["suffix"] for line in lines] == ["good"]
    assert message in reasons(report)["row 1"]


def test_a_picture_of_the_same_name_is_not_replaced(saved: dict[str, Any], tmp_path: Path) -> None:
    saved["saved"] = Dataset(
        {"image": Picture(), "text": ""}, [{"image": picture(tmp_path / "a.png"), "text": "x"}]
    )
    lines, _ = converted(tmp_path)
    (tmp_path / lines[0]["image"]).write_bytes(b"mine")
    with pytest.raises(InputError, match="exists and is another picture: choose another name with --out"):
        converted(tmp_path)
    assert (tmp_path / lines[0]["image"]).read_bytes() == b"mine"


def test_folders_that_are_none(saved: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened by datasets: Directory"):
        converted(tmp_path)
    saved["saved"] = Dataset({"image": Picture(), "text": ""}, [])
    with pytest.raises(InputError, match="there are no pictures in it"):
        converted(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_dataset(tmp_path / "missing", tmp_path)


def test_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets is not installed, but comes with the extra \[datasets\]"):
        read_dataset(tmp_path, tmp_path)


def test_names_that_are_nowhere() -> None:
    assert names_in("int64") == ()
    assert names_in({"a": Several("x")}, "a") == ()
    assert names_in({"a": Several("x")}, "b") == ()
