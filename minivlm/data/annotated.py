"""What the readers of other formats have in common: pictures with what is known about them, or why not.

A reader (coco.py, yolo.py, voc.py, class_folders.py, tables.py, hf_datasets.py) yields an `Annotated` or a
`BadPicture` for each entry of its source, and converting.py makes lines of them. Readers never stop at an
entry that makes no sense; only a source that as a whole is none raises an InputError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from minivlm.data.shapes import Polygons, RunLengths
from minivlm.errors import InputError

Task = Literal["detect", "segment", "caption", "classify", "pairs"]
Corners = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Thing:
    """One object in a picture: a box, a shape or both, in the units that its picture says."""

    name: str
    box: Corners | None = None
    shape: Polygons | RunLengths | None = None


@dataclass(frozen=True)
class Annotated:
    """A picture and what its source says about it."""

    name: str  # what the source calls it, for messages
    path: Path
    things: tuple[Thing, ...] = ()
    texts: tuple[tuple[str | None, str], ...] = ()  # prompt and answer; None: the prompt of the task
    size: tuple[float, float] | None = None  # width and height that numbers refer to; None: the picture's own
    shares: bool = False  # whether `size` is 1 x 1 instead of pixels
    crowds: int = 0  # regions with several objects, which are not among the things


@dataclass(frozen=True)
class BadPicture:
    """An entry that no line is written for."""

    name: str
    reason: str
    path: Path | None = None  # where known; other entries about this picture are left out with it


Entry = Annotated | BadPicture


@dataclass(frozen=True)
class Source:
    """All entries, and the names of the classes in their order, which may be none."""

    entries: Iterable[Entry]
    classes: Sequence[str] = ()
    task: Task = "detect"  # what it was made for


def picture_endings() -> set[str]:
    """Of the formats that Pillow opens, such as ".jpg"."""
    endings = Image.registered_extensions()
    return {ending for ending, kind in endings.items() if kind in Image.OPEN} - {".pdf"}


def usual_ending(kind: str | None) -> str:
    """Of a format as Pillow calls it."""
    endings = [ending for ending, name in Image.registered_extensions().items() if name == kind]
    return {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind or "") or (endings or [".png"])[0]


def pictures_below(folder: Path) -> Iterator[Path]:
    """The files with the name of a picture in a folder and in its folders, in order, without hidden ones.

    Raises InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name the folder that the pictures lie in")
    endings = picture_endings()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in endings and path.is_file() and not hidden:
            yield path


def find_inside(folder: Path, name: object) -> Path:
    """The path of a picture that a file names, which has to lie in this folder.

    An annotation file comes from somebody else. One that names ../../secret.png, or the folders of its
    author's machine, should not lead out of the folder that the user chose. Backslashes are Windows' own.

    Raises InputError: not a name, or one that leads elsewhere.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InputError(f"its picture is {json.dumps(name)[:40]}: expected the name of a file")
    path = folder / name
    if not path.exists() and "\\" in name:
        path = folder / name.replace("\\", "/")
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ("..",)
    depth = 0
    for part in parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise InputError(
                f"{name} leads out of {folder}: choose the folder that holds all pictures with --images"
            )
    return path


def read_text(path: Path, what: str) -> str:
    """A text file in UTF-8, with or without a BOM. Raises InputError: it cannot be read, or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): expected {what}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8: save it as UTF-8") from error


def clean_name(name: object) -> str:
    """The name of a class as it stands in a prompt: one line, single spaces. Empty if it is none."""
    return " ".join(name.split()) if isinstance(name, str) else ""


def numbers(values: object, count: int | None, what: str) -> list[float]:
    """Finite numbers. Raises InputError: something else, or not as many as expected."""
    wrong = InputError(f"{what} is {str(values)[:60]}: expected {count or 'a list of'} numbers")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise wrong
    if count is not None and len(values) != count:
        raise wrong
    try:
        found = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError) as error:
        raise wrong from error
    if len(found) < len(values) or not all(map(math.isfinite, found)):
        raise wrong
    return found


def texts_of(values: Mapping[str, Any], key: str) -> str:
    """The text under a key. Raises InputError: missing, empty, or not text."""
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'"{key}" is {json.dumps(value, default=str)[:40]}: expected text')
    return value.strip()
