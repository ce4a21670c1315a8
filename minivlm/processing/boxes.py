"""Boxes as words: `<loc0256><loc0128><loc0767><loc0895> cat`.

A detector has a head that regresses four numbers. A language model has only words, so PaliGemma
(https://arxiv.org/abs/2407.07726) writes each coordinate as one of 1024 words. A coordinate is a fraction of
the picture's width or height, so the words mean the same at any size or aspect ratio. At the largest
resolution (896), 1024 bins are about one per pixel; finer bins would be more precise than what the tower
sees. y comes before x, as rows come before columns in an array: y0 x0 y1 x1. Read as x y, boxes come out
mirrored about the diagonal. Conventions: big_vision, `evaluators/proj/paligemma/transfers/segmentation.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minivlm.errors import InputError

NUM_BINS = 1024

_LOC = r"<loc([0-9]{4})>"
_SEG = r"<seg[0-9]{3}>"
OBJECT = re.compile(
    rf"(?P<locs>(?:{_LOC})+)"
    rf"(?:{_SEG})*"  # the shape inside the box, after the box if it was requested
    rf"(?P<name>[^;]*?)(?=;|{_LOC}|\Z)"
)


class Box(NamedTuple):
    """A named box in pixels: left, top, right, bottom edge; y points down."""

    x0: float
    y0: float
    x1: float
    y1: float
    name: str = ""


def box_to_tokens(box_xyxy: Sequence[float] | Box, width: float, height: float) -> str:
    """Four tokens, y0 x0 y1 x1, for a box x0, y0, x1, y1 in pixels of a width x height picture.

    bin = round(share * 1023) of what lies inside the picture; halves round to the even bin, as in Python,
    NumPy and TensorFlow. A round trip moves an edge by at most half a bin, except that a box thinner than a
    bin is widened to one: every box that is written can be read back.

    Raises InputError: a picture without area; a box without area or outside the picture, with too few
    numbers or a number that is not finite.
    """
    check_size(width, height)
    if len(box_xyxy) < 4:
        raise InputError(f"the box has {len(box_xyxy)} numbers: expected x0, y0, x1, y1")
    x0, y0, x1, y1 = (float(value) for value in box_xyxy[:4])
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        raise InputError(f"the box ({x0}, {y0}, {x1}, {y1}) has a number that is not finite")
    if not (x0 < x1 and y0 < y1):
        raise InputError(
            f"the box ({x0}, {y0}, {x1}, {y1}) has no area: expected x0 < x1 and y0 < y1, "
            "in the order x0, y0, x1, y1"
        )
    if not (x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise InputError(
            f"the box ({x0}, {y0}, {x1}, {y1}) lies outside the picture of {width} x {height}: expected "
            "pixels of this picture, in the order x0, y0, x1, y1"
        )
    (left, right), (top, bottom) = _bins(x0, x1, width), _bins(y0, y1, height)
    return "".join(f"<loc{number:04}>" for number in (top, left, bottom, right))


def _bins(low: float, high: float, side: float) -> tuple[int, int]:
    """The bins of two edges, clipped to the picture and at least one apart."""
    first, last = (round(min(max(edge, 0), side) / side * (NUM_BINS - 1)) for edge in (low, high))
    first = min(first, NUM_BINS - 2)
    return first, max(last, first + 1)


def boxes_to_text(boxes: Iterable[Box], width: float, height: float) -> str:
    """Boxes as PaliGemma answers `detect`: "<loc…> name ; <loc…> name". Without boxes, an empty string.

    Raises InputError: as `box_to_tokens`; a name with ";" or a `<loc>` token, which could not be read back.
    """
    parts = []
    for box in boxes:
        if ";" in box.name or re.search(f"{_LOC}|{_SEG}", box.name):
            raise InputError(
                f"the name {box.name!r} contains ';' or a token, which separate boxes: remove them"
            )
        parts.append(f"{box_to_tokens(box, width, height)} {box.name}".rstrip())
    return " ; ".join(parts)


def text_to_boxes(text: str, width: float, height: float) -> list[Box]:
    """The boxes in an answer, in pixels of a width x height picture. Any text is accepted.

    A model may write malformed text. A part counts as a box only if it has exactly four `<loc>` tokens in a
    row and a positive area. Everything else is skipped without an error, since a wrong answer is not invalid
    input. `<seg>` tokens between the box and the name are skipped too.

    Raises InputError: a picture without area.
    """
    check_size(width, height)
    boxes = []
    for match in OBJECT.finditer(text):
        bins = [int(digits) for digits in re.findall(_LOC, match["locs"])]
        if len(bins) != 4 or max(bins) >= NUM_BINS or re.search(_SEG, match["name"]):
            continue
        y0, x0, y1, x1 = (value / (NUM_BINS - 1) for value in bins)
        if x0 < x1 and y0 < y1:
            boxes.append(Box(x0 * width, y0 * height, x1 * width, y1 * height, match["name"].strip()))
    return boxes


def check_size(width: float, height: float) -> None:
    if not (width > 0 and height > 0):
        raise InputError(
            f"the picture is {width} x {height}: expected a width and a height above 0, in pixels"
        )
