"""CSV files with a line for each answer, or for each object of a picture.

    image,caption                       filename,width,height,class,xmin,ymin,xmax,ymax
    1.jpg,"a cup of tea, on a table"    1.jpg,640,480,cup,12,34,300,200

The first line names the columns. Lines about the same picture belong together. Numbers are pixels, and a
line whose box is empty stands for a picture without objects. Commas, semicolons or tabs separate the fields.
"""

from __future__ import annotations

import csv
import io
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
    read_text,
    texts_of,
)
from minivlm.errors import InputError

# What columns are called, the first that is there. `--columns caption=answer` says it for other names.
USUAL = {
    "image": ("image", "image_path", "filename", "file_name", "file", "path", "picture", "img"),
    "prompt": ("prefix", "prompt", "question"),
    "answer": ("suffix", "answer", "caption", "text", "label", "class"),
    "class": ("class", "label", "category", "class_name", "name"),
    "x0": ("xmin", "x0", "left"),
    "y0": ("ymin", "y0", "top"),
    "x1": ("xmax", "x1", "right"),
    "y1": ("ymax", "y1", "bottom"),
    "width": ("width",),
    "height": ("height",),
}
EDGES = ("x0", "y0", "x1", "y1")


def read_table(path: Path, images: Path | None = None, columns: Mapping[str, str] | None = None) -> Source:
    """All pictures of a file.

    Args:
        images: the folder that names are relative to; None: that of the file.
        columns: what columns are called, for keys of `USUAL`.

    Raises InputError: it is no such file, or has no column with pictures, or none with answers.
    """
    text = read_text(path, "a table with the names of its columns in the first line")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(rows, [])]
    roles = find_columns(header, columns or {}, USUAL, path)
    if "image" not in roles:
        raise InputError(
            f"{path} has the columns {', '.join(header) or '(none)'}, and none with pictures: name it, as in "
            "--columns image=FILE"
        )
    boxes = set(EDGES) <= set(roles)
    if boxes and "class" not in roles:
        raise InputError(f"{path} has boxes without a class: name the column, as in --columns class=NAME")
    if not boxes and "answer" not in roles:
        raise InputError(
            f"{path} has the columns {', '.join(header)}, and none with answers or boxes: name it, as in "
            "--columns answer=NAME"
        )
    entries = _entries(rows, header, roles, images or path.parent, boxes)
    return Source(entries, task="detect" if boxes else "caption")


def find_columns(
    header: Sequence[str], said: Mapping[str, str], usual: Mapping[str, Sequence[str]], path: Path
) -> dict[str, str]:
    """Which column is what: as the user says, or by its usual name.

    Raises InputError: the user names a column that is not there, or something that no column is.
    """
    for role, name in said.items():
        if role not in usual:
            raise InputError(f"--columns {role}={name}: a column can be {', '.join(usual)}")
        if name not in header:
            raise InputError(f"{path} has no column {name!r}: choose from {', '.join(header)}")
    lower = {name.lower(): name for name in reversed(header)}
    found = {role: next((lower[n] for n in names if n in lower), None) for role, names in usual.items()}
    return {role: name for role, name in found.items() if name is not None} | dict(said)


def _entries(
    rows: Any, header: Sequence[str], roles: Mapping[str, str], folder: Path, boxes: bool
) -> Iterator[Entry]:
    while True:
        number = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadPicture(f"line {number}", f"it cannot be read ({error}): check its quotes")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        path = None
        try:
            if len(cells) != len(header):
                raise InputError(f"it has {len(cells)} fields: expected {len(header)}, as the first line")
            row = dict(zip(header, cells, strict=True))
            path = find_inside(folder, row[roles["image"]].strip())
            values = {role: row[name].strip() for role, name in roles.items()}
            yield _object(values, path) if boxes else _answer(values, path)
        except InputError as error:
            yield BadPicture(f"line {number}", str(error), path)


def _object(values: Mapping[str, str], path: Path) -> Annotated:
    size = None
    if values.get("width") and values.get("height"):
        width, height = numbers((values["width"], values["height"]), 2, "its size")
        size = (width, height)
    edges = [values[edge] for edge in EDGES]
    if not any(edges):
        return Annotated(path.name, path, size=size)
    name = clean_name(values["class"])
    if not name:
        raise InputError("an object has no class")
    x0, y0, x1, y1 = numbers(edges, 4, f"the box of {name!r}")
    return Annotated(path.name, path, (Thing(name, (x0, y0, x1, y1)),), size=size)


def _answer(values: Mapping[str, str], path: Path) -> Annotated:
    prompt = texts_of(values, "prompt") if "prompt" in values else None
    return Annotated(path.name, path, texts=((prompt, texts_of(values, "answer")),))
