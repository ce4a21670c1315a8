"""Data sets that `datasets`, the library of Hugging Face, has saved to disk with `save_to_disk`.

A row has a picture, and beside it a text, a class, or objects: lists of boxes and of their classes. Pictures
lie in the tables as bytes. They are written to a folder as they are, each under a name made of its content,
so that a picture that is in several rows is written once.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.data.annotated import (
    Annotated,
    BadPicture,
    Entry,
    Source,
    Task,
    Thing,
    clean_name,
    find_inside,
    numbers,
    texts_of,
    usual_ending,
)
from minivlm.data.tables import find_columns
from minivlm.errors import InputError, extra
from minivlm.files import write_aside

USUAL = {
    "image": ("image", "img", "picture"),
    "prompt": ("prefix", "prompt", "question"),
    "answer": ("suffix", "answer", "caption", "text", "label", "labels", "class"),
    "objects": ("objects", "annotations"),
    # In the objects of a row:
    "box": ("bbox", "bboxes", "box", "boxes"),
    "class": ("category", "categories", "category_id", "label", "labels", "class"),
}
INSIDE = ("box", "class")


def read_dataset(
    folder: Path,
    pictures: Path,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    box_format: str = "xywh",
) -> Source:
    """All rows of a data set.

    Args:
        pictures: the folder that pictures are written to.
        split: which one, if the data set has several.
        columns: what columns are called, for keys of `USUAL`.
        box_format: whether boxes are x, y, width, height, or the two corners, "xyxy".

    Raises InputError: `datasets` is not installed; it cannot open the folder; a split or column is not there.
    """
    with extra("datasets"):
        import datasets
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: expected what `save_to_disk` of datasets has written")
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # of a folder of another kind it raises almost anything
        raise InputError(f"{folder} cannot be opened by datasets: {' '.join(str(error).split())}") from error
    if isinstance(found, dict):
        if split not in found:
            raise InputError(f"{folder} has the parts {', '.join(found)}: choose one with --split")
        found = found[split]
    elif split is not None:
        raise InputError(f"{folder} is one part, not several: leave out --split")
    said = dict(columns or {})
    inside = {role: said.pop(role) for role in INSIDE if role in said}
    outer = {role: names for role, names in USUAL.items() if role not in INSIDE}
    roles = find_columns(list(found.features), said, outer, folder)
    if "image" not in roles or not {"answer", "objects"} & set(roles):
        raise InputError(
            f"{folder} has the columns {', '.join(found.features)}: say which has the pictures, and which "
            "answers or objects, as in --columns image=NAME answer=NAME"
        )
    found = found.cast_column(roles["image"], datasets.Image(decode=False))  # the bytes, as they are stored
    if "objects" in roles:
        entries = _with_objects(found, roles, inside, (pictures, folder), box_format)
        feature = found.features[roles["objects"]]
        classes = next((names for key in USUAL["class"] if (names := names_in(feature, key))), [])
        return Source(entries, _named(classes), "detect")
    classes = names_in(found.features[roles["answer"]])
    task: Task = "classify" if classes else "caption"
    return Source(_with_answers(found, roles, classes, (pictures, folder)), _named(classes), task)


def _named(classes: Sequence[str]) -> list[str]:
    return [name for name in map(clean_name, classes) if name]


def names_in(feature: Any, key: str | None = None) -> Sequence[str]:
    """The names of a ClassLabel, wherever it is among the features of a column; empty if there is none.

    Versions of datasets write lists in different ways: Sequence(...), List(...), [...], or a dict of them.
    """
    for _ in range(6):
        if hasattr(feature, "names"):
            return feature.names if key is None else ()
        if isinstance(feature, Mapping) and key in feature:
            feature, key = feature[key], None
        elif hasattr(feature, "feature"):
            feature = feature.feature
        elif isinstance(feature, list) and feature:
            feature = feature[0]
        else:
            break
    return ()


def _with_answers(
    rows: Any, roles: Mapping[str, str], classes: Sequence[str], folders: tuple[Path, Path]
) -> Iterator[Entry]:
    for number, row in enumerate(rows):
        path = None
        try:
            path = _picture(row[roles["image"]], *folders)
            prompt = texts_of(row, roles["prompt"]) if "prompt" in roles else None
            value = row[roles["answer"]]
            if classes:
                answers = [_name(value, classes)]
            elif isinstance(value, list):  # several captions of one picture
                answers = [texts_of({roles["answer"]: one}, roles["answer"]) for one in value]
            else:
                answers = [texts_of(row, roles["answer"])]
            yield Annotated(f"row {number}", path, texts=tuple((prompt, answer) for answer in answers))
        except InputError as error:
            yield BadPicture(f"row {number}", str(error), path)


def _with_objects(
    rows: Any,
    roles: Mapping[str, str],
    inside: Mapping[str, str],
    folders: tuple[Path, Path],
    box_format: str,
) -> Iterator[Entry]:
    feature = rows.features[roles["objects"]]
    for number, row in enumerate(rows):
        path = None
        try:
            path = _picture(row[roles["image"]], *folders)
            things = tuple(_things(row[roles["objects"]], feature, inside, box_format))
            yield Annotated(f"row {number}", path, things)
        except InputError as error:
            yield BadPicture(f"row {number}", str(error), path)


def _things(objects: Any, feature: Any, inside: Mapping[str, str], box_format: str) -> Iterator[Thing]:
    """The objects of a row, which are lists by name or a list of objects."""
    if isinstance(objects, list):
        if not objects:
            return
        objects = {key: [one.get(key) for one in objects] for key in objects[0]}
    if not isinstance(objects, Mapping):
        raise InputError(f"its objects are {str(objects)[:40]}: expected boxes and classes")
    keys = {}
    for role in INSIDE:
        tried = (inside[role],) if role in inside else USUAL[role]
        key = next((name for name in tried if name in objects), None)
        if key is None:
            raise InputError(
                f"its objects have {', '.join(objects)}, and no {role}: say it, as in --columns {role}=NAME"
            )
        keys[role] = key
    names = names_in(feature, keys["class"])
    for box, value in zip(objects[keys["box"]], objects[keys["class"]], strict=True):
        name = _name(value, names)
        x0, y0, x1, y1 = numbers(box, 4, f"the box of {name!r}")
        yield Thing(name, (x0, y0, x1, y1) if box_format == "xyxy" else (x0, y0, x0 + x1, y0 + y1))


def _name(value: object, names: Sequence[str]) -> str:
    """The name of a class, given by number or as it is. Raises InputError: it has none."""
    if isinstance(value, int) and 0 <= value < len(names):
        value = names[value]
    name = clean_name(value)
    if not name:
        raise InputError(f"an object or a picture has the class {value!r}, which has no name")
    return name


def _picture(value: object, pictures: Path, folder: Path) -> Path:
    """Where a picture lies on disk: in the data set's folder, or else it is written into `pictures`.

    Raises InputError: there is no picture, it lies elsewhere, or it cannot be written.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else None
    if content is None:
        if not path:
            raise InputError("it has no picture")
        return find_inside(folder, path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise InputError("its picture is not a picture in a known format") from error
    to = pictures / (hashlib.sha256(content).hexdigest()[:16] + usual_ending(kind))
    if not to.exists() or to.read_bytes() != content:
        if to.exists():
            raise InputError(f"{to} exists and is another picture: choose another name with --out")
        with write_aside(to) as temporary:
            temporary.write_bytes(content)
    return to
