"""Pascal VOC's XML (http://host.robots.ox.ac.uk/pascal/VOC): boxes, a file for each picture.

    <annotation>
      <filename>a.jpg</filename>
      <size><width>640</width><height>480</height></size>
      <object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
    </annotation>

The first pixel is number 1 there, and the last one belongs to the box: this one is 64 pixels wide, from edge
0 to edge 64. (Programs that label pictures often count from 0 instead; a pixel is less than what a word of a
box tells apart in most pictures.) Objects marked `difficult` are kept, parts of objects are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from minivlm.data.annotated import (
    Annotated,
    BadPicture,
    Entry,
    Source,
    Thing,
    clean_name,
    find_inside,
    numbers,
    picture_endings,
    read_text,
)
from minivlm.errors import InputError


def read_voc(folder: Path, split: str | None = None, images: Path | None = None) -> Source:
    """The pictures of a data set, or of a folder with XML files.

    Args:
        split: only those that ImageSets/Main/SPLIT.txt lists; None: all.
        images: where the pictures lie; None: in JPEGImages, or beside the XML files.

    Raises InputError: there are no such files.
    """
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    if images is None:
        images = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else annotations
    if split is None:
        files = sorted(annotations.glob("*.xml"))
    else:
        listed = read_text(
            folder / "ImageSets" / "Main" / f"{split}.txt", "the names of the pictures of a part"
        )
        files = [annotations / f"{line.split()[0]}.xml" for line in listed.splitlines() if line.strip()]
    if not files:
        raise InputError(f"{annotations} has no XML files: name the folder of a Pascal VOC data set")
    return Source(_entries(files, images))


def _entries(files: list[Path], images: Path) -> Iterator[Entry]:
    for file in files:
        try:
            yield _read(file, images)
        except InputError as error:
            yield BadPicture(file.name, str(error))


def _read(file: Path, images: Path) -> Annotated:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:  # a few lines of them can mean gigabytes
        raise InputError(f"{file} declares entities, which annotations do not need: remove them")
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file} is not XML ({error})") from error
    name = (root.findtext("filename") or "").strip()
    path = find_inside(images, name or file.stem)
    if not path.is_file():  # many files name the picture without its ending, or as it was called before
        beside = [images / (file.stem + ending) for ending in sorted(picture_endings())]
        path = next((one for one in beside if one.is_file()), path)
    size = None
    width, height = (root.findtext(f"size/{side}") for side in ("width", "height"))
    if width is not None and height is not None:
        across, down = numbers((width, height), 2, "its size")
        size = (across, down) if across and down else None  # 0 x 0: not known
    things = tuple(_thing(element) for element in root.findall("object"))
    return Annotated(file.name, path, things, size=size)


def _thing(element: ElementTree.Element) -> Thing:
    name = clean_name(element.findtext("name"))
    if not name:
        raise InputError("an object has no name")
    edges = [element.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = numbers(edges, 4, f"the box of {name!r}")
    return Thing(name, (x0 - 1, y0 - 1, x1, y1))
