"""Shapes as other formats have them: polygons and run lengths as masks, and how a turned picture turns them.

Run lengths are COCO's (https://cocodataset.org, `maskApi.c` of its API): the lengths of runs of equal pixels,
column by column from the left, each from the top, of which the first lies outside. Written compactly, each is
a number in pieces of five bits, least first, one printable letter each, and from the fourth on it is the
difference to the one before the last.

A camera stores the pixels as its sensor lay, and notes in EXIF how to turn them. Annotations are about the
upright picture in most tools (browsers and OpenCV turn it), and about the stored one in some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from minivlm.errors import InputError

Polygons = tuple[tuple[float, ...], ...]  # x0, y0, x1, y1, ... of each part of a shape

FINER = 4  # Pillow draws on whole pixels: polygons are drawn this many times as large


@dataclass(frozen=True)
class RunLengths:
    """A mask as COCO stores it."""

    height: int
    width: int
    counts: tuple[int, ...]

    def to_mask(self) -> np.ndarray:
        """Bools [height, width]. Raises InputError: the runs are not as long as the picture has pixels."""
        if self.height < 1 or self.width < 1 or min(self.counts, default=0) < 0:
            raise InputError(
                f"a mask of {self.width} x {self.height} pixels has a negative run: expected RLE"
            )
        if sum(self.counts) != self.height * self.width:
            raise InputError(
                f"the runs of a mask have {sum(self.counts)} pixels in all: "
                f"expected {self.width} x {self.height}"
            )
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape((self.height, self.width), order="F")


def decode_counts(text: str) -> tuple[int, ...]:
    """The run lengths in a compact text.

    >>> decode_counts("04T1")
    (0, 4, 36)

    Raises InputError: a letter that stands for nothing, or a number without its end.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        piece = ord(letter) - 48
        if not 0 <= piece < 64:
            raise InputError(f"the compressed mask has the letter {letter!r}: expected RLE as COCO writes it")
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:  # the last piece, whose highest bit is the sign
            if piece & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
        elif shift > 60:
            raise InputError("the compressed mask has an endless number: expected RLE as COCO writes it")
    if shift:
        raise InputError("the compressed mask ends inside a number: it is truncated")
    return tuple(counts)


def draw_polygons(polygons: Polygons, width: int, height: int) -> np.ndarray:
    """A mask [height, width] of the pixels of which at least half lies inside one of the polygons.

    Of a part that is too thin to have such a pixel, the pixels that it touches.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    for points in map(points_of, polygons):
        xs, ys = zip(*points, strict=True)
        left, top = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
        right, bottom = min(width, math.ceil(max(xs))), min(height, math.ceil(max(ys)))
        if left >= right or top >= bottom:  # outside
            continue
        canvas = Image.new("L", ((right - left) * FINER, (bottom - top) * FINER))
        # Pillow names pixels by whole numbers, which here are edges.
        drawn = [(round((x - left) * FINER - 0.5), round((y - top) * FINER - 0.5)) for x, y in points]
        ImageDraw.Draw(canvas).polygon(drawn, fill=255)
        covered = np.asarray(canvas.reduce(FINER))
        inside = covered >= 128
        mask[top:bottom, left:right] |= inside if inside.any() else covered > 0
    return mask


def bounds_of_polygons(polygons: Polygons) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around all points."""
    xs, ys = zip(*(point for part in polygons for point in points_of(part)), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def points_of(flat: Sequence[float]) -> list[tuple[float, float]]:
    """x0, y0, x1, y1, ... as points. Raises InputError: an odd number, or fewer than three points."""
    if len(flat) < 6 or len(flat) % 2:
        raise InputError(f"a polygon has {len(flat)} numbers: expected x and y of three points or more")
    return list(zip(flat[::2], flat[1::2], strict=True))


def bounds_of_mask(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around all pixels of a mask. Raises InputError: it has none."""
    if not mask.any():
        raise InputError("the mask of an object has no pixel: expected a shape inside the picture")
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# ---- turned pictures ---------------------------------------------------------------------------------------

# The orientations 2 to 8 of EXIF: how Pillow makes the stored picture upright
METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # orientations in which width and height change places


def turn_point(x: float, y: float, orientation: int) -> tuple[float, float]:
    """Where a point of the stored picture lies in the upright one, both as shares of width and height."""
    turned = {
        2: (1 - x, y),
        3: (1 - x, 1 - y),
        4: (x, 1 - y),
        5: (y, x),
        6: (1 - y, x),
        7: (1 - y, 1 - x),
        8: (y, 1 - x),
    }
    return turned.get(orientation, (x, y))


def turn_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """The mask of the stored picture as that of the upright one."""
    if orientation not in METHODS:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).transpose(METHODS[orientation])) > 0
