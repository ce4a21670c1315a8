"""What the commands draw and write: pictures with boxes and masks, and masks in JSON."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from minivlm.errors import InputError
from minivlm.files import check_output, write_aside
from minivlm.looking import draw_masks, drawn_size
from minivlm.processing import Mask, text_to_boxes, text_to_masks
from minivlm.processing.qwen_tags import tags_to_boxes

SOFTWARE = "minivlm"  # stands in the EXIF note of every drawing


def draw_answers(picture: Image.Image, answers: Iterable[str]) -> Image.Image:
    """A copy of the picture with the boxes of all answers, and with the masks where an answer has them."""
    found: list[Mask] = []
    for answer in answers:
        masks = {mask.box: mask for mask in text_to_masks(answer, *picture.size)}
        nothing = np.zeros((picture.height, picture.width), dtype=np.bool_)
        boxes = text_to_boxes(answer, *picture.size) + tags_to_boxes(answer, *picture.size)
        found += [masks.get(box, Mask(box, nothing)) for box in boxes]
    return draw_masks(picture, found)


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask [height, width] as COCO writes it in JSON, uncompressed.

    `counts` are lengths of runs of equal pixels, column by column from the left, each from the top.
    The first run is outside the mask, and may be 0 long. `pycocotools.mask.frPyObjects` reads it.

    >>> run_lengths(np.array([[0, 1, 1], [0, 0, 1]], dtype=bool))
    {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff([0, *edges, len(pixels)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def drawings(
    draw: Path, pictures: Sequence[str], sizes: Sequence[tuple[int, int]], inputs: Sequence[str | Path]
) -> list[Path]:
    """A name for the drawing of each picture: that of `draw`, or PNG files in the folder `draw`.

    Args:
        sizes: width and height of the pictures.
        inputs: files that must not be replaced.

    Raises InputError: several pictures and one file; a name that the drawing cannot be written to, or that a
    file has which is no earlier drawing.
    """
    if draw.is_dir() or not draw.suffix:
        stems = Counter[str]()
        names = []
        for stem in (Path(picture).stem for picture in pictures):
            stems[stem] += 1
            names.append(draw / (f"{stem}.png" if stems[stem] == 1 else f"{stem}-{stems[stem]}.png"))
    elif len(pictures) > 1:
        raise InputError(
            f"{draw} is one file, for {len(pictures)} pictures: name a folder, such as {draw.with_suffix('')}"
        )
    else:
        names = [draw]
    for name, size in zip(names, sizes, strict=True):
        _check_format(name)
        _check_sides(name, *drawn_size(*size))
        check_output(name, inputs, replace=is_drawing(name))
    return names


def is_drawing(path: Path) -> bool:
    """Whether a file is an earlier drawing of ours and no photograph. BMP and GIF keep no such note."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with Image.open(path) as picture:
            return bool(picture.getexif().get(ExifTags.Base.Software) == SOFTWARE)
    except Exception:  # no picture, or a damaged one
        return False


def _check_format(path: Path) -> None:
    """Raises InputError: the ending names no format that colors can be written in."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=kind)
    except (KeyError, OSError, ValueError) as error:  # unknown, can only be read, or holds no colors
        raise InputError(
            f"{path} has no ending that names a picture format to write: use something like {path.stem}.png"
        ) from error


def _check_sides(path: Path, width: int, height: int) -> None:
    """Raises InputError: the format cannot hold so many pixels side by side, as WebP no more than 16383."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    try:
        for size in ((width, 1), (1, height)):
            content = io.BytesIO()
            Image.new("RGB", size).save(content, format=kind)
            if kind in Image.OPEN and Image.open(content).size != size:  # ICO is made smaller without a word
                raise ValueError
    except Exception as error:  # formats raise almost anything
        raise InputError(
            f"{path} would have {width} x {height} pixels, which {kind} cannot hold: use {path.stem}.png"
        ) from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name's ending says. Raises InputError: it cannot be written."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    with write_aside(path) as temporary:
        try:
            picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()], exif=exif)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the format
                raise
            raise InputError(f"{path} cannot be written ({error}): use {path.stem}.png") from error
