"""COCO's JSON (https://cocodataset.org/#format-data): boxes, polygons, run lengths and captions.

One file has all pictures, annotations that name them by number, and categories. A box is x, y, width, height
in pixels from the picture's corner. A shape is a list of polygons, or run lengths. An annotation with
`iscrowd` is about a region with many objects instead of one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minivlm.data.annotated import (
    Annotated,
    BadPicture,
    Corners,
    Entry,
    Source,
    Thing,
    clean_name,
    find_inside,
    numbers,
    read_text,
    texts_of,
)
from minivlm.data.shapes import Polygons, RunLengths, decode_counts, points_of
from minivlm.errors import InputError


def read_coco(path: Path, images: Path | None = None) -> Source:
    """All pictures of a file.

    Args:
        images: the folder that file names are relative to; None: that of the file.

    Raises InputError: it is no such file.
    """
    try:
        values = json.loads(read_text(path, "the JSON file of a COCO data set"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({error}): expected the annotations of COCO") from error
    wanted = ("images", "annotations")
    if not isinstance(values, dict) or any(not isinstance(values.get(key), list) for key in wanted):
        raise InputError(f'{path} has no lists "images" and "annotations": expected the annotations of COCO')
    listed = values.get("categories")
    categories = {}
    for category in listed if isinstance(listed, list) else ():
        if isinstance(category, dict) and isinstance(category.get("id"), int):
            categories[category["id"]] = clean_name(category.get("name"))
    entries = _entries(values, categories, images or path.parent)
    captions = any(isinstance(one, dict) and "caption" in one for one in values["annotations"])
    names = [name for name in categories.values() if name]
    return Source(entries, names, "caption" if captions else "detect")


def _entries(values: Mapping[str, Any], categories: Mapping[int, str], folder: Path) -> Iterator[Entry]:
    about = defaultdict(list)
    for annotation in values["annotations"]:
        number = annotation.get("image_id") if isinstance(annotation, dict) else None
        about[number if isinstance(number, (int, str)) else None].append(annotation)
    seen = set()
    for image in values["images"]:
        number = image.get("id") if isinstance(image, dict) else None
        if not isinstance(image, dict) or not isinstance(number, (int, str)):
            yield BadPicture(str(image)[:40], "it has no id")
            continue
        name, path = str(image.get("file_name", number)), None
        try:
            path = find_inside(folder, image.get("file_name"))
            if number in seen:
                raise InputError(f"the id {number} is given to two pictures")
            seen.add(number)
            yield _read(image, about.pop(number, []), categories, name, path)
        except InputError as error:
            yield BadPicture(name, str(error), path)
    for number, lost in about.items():
        if number not in seen:
            yield BadPicture(f"picture {number}", f"it has {len(lost)} annotations, but is not in the file")


def _read(
    image: Mapping[str, Any],
    annotations: list[Mapping[str, Any]],
    categories: Mapping[int, str],
    name: str,
    path: Path,
) -> Annotated:
    things, texts, crowds = [], [], 0
    for annotation in annotations:
        if "caption" in annotation:
            texts.append((None, texts_of(annotation, "caption")))
        elif annotation.get("iscrowd"):
            crowds += 1
        else:
            things.append(_thing(annotation, categories))
    size = None
    if image.get("width") is not None and image.get("height") is not None:
        width, height = numbers((image["width"], image["height"]), 2, "its size")
        size = (width, height)
    return Annotated(name, path, tuple(things), tuple(texts), size, crowds=crowds)


def _thing(annotation: Mapping[str, Any], categories: Mapping[int, str]) -> Thing:
    number = annotation.get("category_id")
    if not isinstance(number, int) or number not in categories:
        raise InputError(
            f"an object has the category {json.dumps(number)[:40]}, which the file does not list"
        )
    if not categories[number]:
        raise InputError(f"an object has the category {number}, which has no name")
    box: Corners | None = None
    if annotation.get("bbox"):
        x, y, width, height = numbers(annotation["bbox"], 4, "a box")
        box = (x, y, x + width, y + height)
    return Thing(categories[number], box, read_shape(annotation.get("segmentation")))


def read_shape(value: object) -> Polygons | RunLengths | None:
    """A shape as COCO's JSON has it; None if it is empty. Raises InputError: it makes no sense."""
    if not value:
        return None
    if isinstance(value, Mapping):
        height, width = numbers(value.get("size"), 2, "the size of a mask")
        counts = value.get("counts")
        if isinstance(counts, str):
            runs = decode_counts(counts)
        else:
            runs = tuple(map(int, numbers(counts, None, "the runs of a mask")))
        return RunLengths(int(height), int(width), runs)
    if not isinstance(value, list):
        raise InputError(f"a shape is {str(value)[:40]}: expected polygons or run lengths")
    polygons = tuple(tuple(numbers(part, None, "a polygon")) for part in value)
    for part in polygons:
        points_of(part)
    return polygons
