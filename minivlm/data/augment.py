"""Other views of your own pictures, with their boxes moved along: shift, zoom, crop and color.

What a line says stays true. A window is laid over the picture: one as large, but shifted; a larger one, in
which the picture is smaller (zoom); or a smaller one (crop). No box is ever cut: a window holds all boxes of
the line, or stays as it was. A shape's `<seg>` words are about the inside of its box and do not change.

There is no flip. It exchanges left and right, in words that no program can tell apart (a right answer, what
is left), in letters and in digits, so a flipped line may be false.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from minivlm.data.samples import Opened, Sample
from minivlm.errors import InputError
from minivlm.processing import box_to_tokens, text_to_boxes

KINDS = ("shift", "zoom", "crop", "color")
FARTHEST = 0.1  # of a side that a picture is shifted
LARGEST, SMALLEST = 1.25, 0.8  # of a side of the picture, a side of the window
BRIGHTEST = 0.2  # more or less than 1: brightness, contrast and saturation
STREAM = 2**29  # of random numbers: [seed, stream, number of the row]

Window = tuple[float, float, float]  # left, top, side, in sides of the picture
_BOX = re.compile(r"(?:<loc[0-9]{4}>){4}")
_FOREIGN = re.compile(r"<box>|<\|box_start\|>|<\|det\|>|bbox", re.IGNORECASE)


@dataclass(frozen=True)
class Augment:
    """What becomes of a row: a function of (seed, its number in the run) alone."""

    kinds: tuple[str, ...]
    seed: int

    def __call__(self, row: Opened, number: int) -> Opened:
        if len(row.pictures) != 1:  # boxes do not say which of several pictures they are in
            return row
        rng = np.random.default_rng([self.seed, STREAM, number])
        picture, prefix, suffix = row.pictures[0], row.prefix, row.suffix
        window = choose_window(self.kinds, [prefix, suffix], rng)
        if window != (0.0, 0.0, 1.0):
            picture = seen_through(picture, window)
            prefix, suffix = moved(prefix, window), moved(suffix, window)
        if "color" in self.kinds:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                picture = change(picture).enhance(rng.uniform(1 - BRIGHTEST, 1 + BRIGHTEST))
        return Opened([picture], prefix, suffix)


def check_kinds(kinds: Sequence[str], samples: Sequence[Sample] = ()) -> None:
    """Raises InputError: an unknown kind, or boxes that could not be moved along."""
    for kind in kinds:
        if kind == "flip":
            raise InputError(
                "flip is no choice: it exchanges left and right, also in words, letters and digits, and then "
                f"a line may be false. Choose from {', '.join(KINDS)}"
            )
        if kind not in KINDS:
            raise InputError(f"{kind!r} is unknown: choose from {', '.join(KINDS)}")
    foreign = [one.line for one in samples if _FOREIGN.search(one.prefix) or _FOREIGN.search(one.suffix)]
    if foreign and set(kinds) - {"color"}:
        raise InputError(
            f"line {foreign[0]} has a box in other words than <loc>, which would not move along with its "
            "picture: choose color alone, or nothing"
        )


def choose_window(kinds: Sequence[str], texts: Sequence[str], rng: np.random.Generator) -> Window:
    """A window that holds all boxes in the texts."""
    low = SMALLEST if "crop" in kinds else 1.0
    high = LARGEST if "zoom" in kinds else 1.0
    side = float(rng.uniform(low, high))
    boxes = [box for text in texts for box in text_to_boxes(text, 1, 1)]
    corners = []
    for first, last in (("x0", "x1"), ("y0", "y1")):
        # A larger window lies anywhere around the picture, a smaller one anywhere inside.
        corner = rng.uniform(min(0.0, 1.0 - side), max(0.0, 1.0 - side))
        if "shift" in kinds:
            corner += rng.uniform(-FARTHEST, FARTHEST)
        if boxes:
            least = max(getattr(box, last) for box in boxes) - side
            most = min(getattr(box, first) for box in boxes)
            if least > most:  # this window is too small for them
                return (0.0, 0.0, 1.0)
            corner = min(max(corner, least), most)
        corners.append(float(corner))
    return (corners[0], corners[1], side)


def seen_through(picture: Image.Image, window: Window) -> Image.Image:
    """A picture of the same size; outside of the old one it has the mean color of its edge."""
    left, top, side = window
    width, height = picture.size
    extent = (left * width, top * height, (left + side) * width, (top + side) * height)
    pixels = np.asarray(picture.convert("RGB"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = edge.mean(axis=0).round().astype(int).tolist()
    return picture.convert("RGB").transform(
        picture.size, Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR, fillcolor=(red, green, blue)
    )


def moved(text: str, window: Window) -> str:
    """The text with its boxes where they are in the window."""
    left, top, side = window

    def move(match: re.Match[str]) -> str:
        boxes = text_to_boxes(match[0], 1, 1)
        if not boxes:  # malformed, in a prompt
            return match[0]
        x0, y0, x1, y1 = boxes[0][:4]
        return box_to_tokens(
            ((x0 - left) / side, (y0 - top) / side, (x1 - left) / side, (y1 - top) / side), 1, 1
        )

    return _BOX.sub(move, text)
