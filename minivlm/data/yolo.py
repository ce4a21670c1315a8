"""YOLO's text files, as Ultralytics' and Darknet's programs read them.

Beside each picture `images/a.jpg` is a file `labels/a.txt` with a line for each object:

    0 0.5 0.5 0.2 0.4                  class, middle x, middle y, width, height
    0 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7  class, the points x, y of a polygon

All numbers but the class are shares of the width and height of the upright picture. Without a folder
`images`, labels lie in the same folder as the pictures. A picture without such a file, or with an empty one,
shows none of the objects. The names of the classes are in data.yaml, or in a text file, one in each line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.data.annotated import (
    Annotated,
    BadPicture,
    Entry,
    Source,
    Thing,
    clean_name,
    find_inside,
    numbers,
    pictures_below,
    read_text,
)
from minivlm.data.shapes import points_of
from minivlm.errors import InputError, extra

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")


def read_yolo(
    path: Path, split: str | None = None, images: Path | None = None, names: Path | None = None
) -> Source:
    """The pictures of a data set.

    Args:
        path: its folder, or its data.yaml.
        split: which of the parts that data.yaml names, such as train; None: all pictures in the folder.
        images: a folder with pictures, instead of what data.yaml says.
        names: a text file with the name of a class in each line, instead of data.yaml.

    Raises InputError: there is no such folder, or nothing says what the classes are called.
    """
    folder = path if path.is_dir() else path.parent
    tried = [path, folder / "data.yaml", *sorted(folder.glob("*.y*ml"))]
    described = next((one for one in tried if one.is_file()), None)
    listed = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if names is not None or (listed is not None and (described is None or path.is_dir()) and split is None):
        values: dict[str, Any] = {}
        lines = read_text(names or listed or path, "a file with the names of the classes").splitlines()
        classes = dict(enumerate(map(clean_name, lines)))
    elif described is not None:
        values = _read_yaml(described)
        classes = _names(values.get("names"), described)
    else:
        raise InputError(
            f"{folder} has neither a data.yaml nor a classes.txt: name a file with the name of a class in "
            "each line with --names"
        )
    if split is not None and images is None:
        found: list[Path | BadPicture] = list(_part(values, split, described or path))
    else:
        found = [*_all(images or folder)]
    entries = (one if isinstance(one, BadPicture) else _read(one, folder, classes) for one in found)
    return Source(entries, [name for _, name in sorted(classes.items()) if name])


def _read_yaml(path: Path) -> dict[str, Any]:
    with extra("yolo"):
        import yaml
    try:
        values = yaml.safe_load(read_text(path, "the data.yaml of a YOLO data set"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}): expected names") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} has no names: expected the data.yaml of a YOLO data set")
    return values


def _names(value: object, path: Path) -> dict[int, str]:
    """By number, from a list or from a mapping. YAML reads names such as no, on and 7 as other things."""
    pairs: Mapping[Any, Any] = dict(enumerate(value)) if isinstance(value, list) else {}
    if isinstance(value, dict):
        pairs = value
    if not pairs or not all(isinstance(key, int) for key in pairs):
        raise InputError(f"{path} has no names: expected a list of them, or a number and a name in each line")
    wrong = [name for name in pairs.values() if name is not None and not isinstance(name, str)]
    if wrong:
        raise InputError(f"{path} has the name {wrong[0]!r}, which is no text in YAML: put it in quotes")
    return {number: clean_name(name) for number, name in pairs.items()}


def _part(values: Mapping[str, Any], split: str, path: Path) -> Iterator[Path | BadPicture]:
    """The pictures of one part: one or several folders, or text files with a picture in each line."""
    parts = [key for key in ("train", "val", "test") if values.get(key)]
    if split not in parts:
        raise InputError(f"{path} has no part {split!r}: choose from {', '.join(parts) or 'none'}")
    root = path.parent / str(values.get("path") or "")
    for name in values[split] if isinstance(values[split], list) else [values[split]]:
        # Many files say ../train/images and mean ./train/images; Ultralytics' program reads both, too.
        tried = [base / str(name) for base in (root, path.parent)]
        tried += [path.parent / str(name).removeprefix("../")]
        there = next((one for one in tried if one.exists()), None)
        if there is None:
            raise InputError(f"{path} names {name}, which is not there: name the folder with --images")
        if there.is_dir():
            yield from pictures_below(there)
        else:
            for line in read_text(there, "a list of pictures").splitlines():
                if line.strip():
                    yield _listed(line.strip(), there.parent)


def _all(folder: Path) -> list[Path]:
    """All pictures; where there are folders `images`, only those in them, and no drawn curves beside them."""
    found = list(pictures_below(folder))
    return [path for path in found if "images" in path.relative_to(folder).parts[:-1]] or found


def _listed(name: str, folder: Path) -> Path | BadPicture:
    try:
        return find_inside(folder, name)
    except InputError as error:
        return BadPicture(name, str(error))


def label_of(picture: Path) -> Path:
    """The file with the labels of a picture: `images`, the last folder of that name, becomes `labels`."""
    parts = list(picture.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read(picture: Path, folder: Path, classes: Mapping[int, str]) -> Entry:
    name = str(picture.relative_to(folder) if picture.is_relative_to(folder) else picture)
    try:
        label = label_of(picture)
        lines = read_text(label, "labels").splitlines() if label.is_file() else []
        things = [_thing(line.split(), classes) for line in lines if line.strip()]
    except InputError as error:
        return BadPicture(name, str(error), picture)
    return Annotated(name, picture, tuple(things), shares=True)


def _thing(words: Sequence[str], classes: Mapping[int, str]) -> Thing:
    if not words[0].isdecimal():
        raise InputError(f"its labels have the class {words[0]!r}: expected a whole number")
    if not classes.get(int(words[0])):
        raise InputError(f"its labels have the class {words[0]}, which has no name")
    values = numbers(words[1:], None, "a line of its labels")
    if max(map(abs, values), default=0) > 2:
        raise InputError(f"its labels have {max(values):g}: expected shares from 0 to 1, not pixels")
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return Thing(classes[int(words[0])], box)
    if len(values) < 6 or len(values) % 2:
        raise InputError(
            f"a line of its labels has {len(values)} numbers: expected 4, or 6 and more in pairs"
        )
    points_of(values)
    return Thing(classes[int(words[0])], shape=(tuple(values),))
