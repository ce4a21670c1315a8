"""Folders that are named like what their pictures show: `pictures/cat/1.jpg`, `pictures/dog/2.jpg`.

The first folder counts; further ones in it are searched, too. This is `ImageFolder` of torchvision.
"""

from __future__ import annotations

from pathlib import Path

from minivlm.data.annotated import Annotated, BadPicture, Entry, Source, clean_name, pictures_below
from minivlm.errors import InputError


def read_class_folders(folder: Path) -> Source:
    """All pictures, each with the name of its folder as the answer.

    Raises InputError: there are no folders with pictures.
    """
    entries: list[Entry] = []
    classes = []
    for path in pictures_below(folder):
        inside = path.relative_to(folder)
        name = clean_name(inside.parts[0])
        if len(inside.parts) == 1:
            entries.append(BadPicture(str(inside), "it lies in no folder of a class", path))
            continue
        classes.append(name)
        entries.append(Annotated(str(inside), path, texts=((None, name),)))
    if not classes:
        raise InputError(f"{folder} has no folders with pictures: expected one for each class")
    return Source(entries, list(dict.fromkeys(classes)), "classify")
