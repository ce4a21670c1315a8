"""What the commands draw and write: pictures with boxes and masks, and masks in JSON."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.looking import draw_masks
from minivlm.processing import Mask, text_to_boxes, text_to_masks


def draw_answers(picture: Image.Image, answers: Iterable[str]) -> Image.Image:
    """A copy of the picture with the boxes of all answers, and with the masks where an answer has them."""
    found: list[Mask] = []
    for answer in answers:
        masks = {mask.box: mask for mask in text_to_masks(answer, *picture.size)}
        nothing = np.zeros((picture.height, picture.width), dtype=np.bool_)
        found += [masks.get(box, Mask(box, nothing)) for box in text_to_boxes(answer, *picture.size)]
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


def check_picture_name(path: Path) -> None:
    """Raises InputError: the ending names no format that colors can be written in."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=kind)
    except (KeyError, OSError, ValueError) as error:  # unknown, can only be read, or holds no colors
        raise InputError(
            f"{path} has no ending that names a picture format to write: use something like {path.stem}.png"
        ) from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name's ending says. Raises InputError: it cannot be written."""
    with write_aside(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
