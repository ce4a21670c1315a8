"""DeepSeek-VL2's words for places (https://arxiv.org/abs/2412.10302, section 3.1).

    <|ref|>the cat<|/ref|>               what the text calls a part of the picture; as a prompt: where is it?
    <|det|>[[120, 340, 560, 780]]<|/det|>    its boxes: left, top, right and bottom edge
    <|grounding|>describe the picture    a prompt whose answer names places as it goes

A coordinate is a whole number from 0 to 999 of the picture's width or height, both ends included, in digits.
Qwen-VL's (qwen_tags.py) are much alike, but for brackets, and for thousandths that never reach 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from minivlm.errors import InputError
from minivlm.processing.boxes import Box, check_size

REF, REF_END, DET, DET_END = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
GROUNDING = "<|grounding|>"
TAGS = (REF, REF_END, DET, DET_END, GROUNDING)
LAST = 999  # the picture's right or bottom edge

_TAG = re.compile("|".join(map(re.escape, TAGS[:4])))
_BOX = r"\[\s*[0-9]{1,4}(?:\s*,\s*[0-9]{1,4}){3}\s*\]"
_BOXES = re.compile(rf"\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]")
_FOUND = re.compile(
    rf"(?:{re.escape(REF)}(?P<name>[^<]*){re.escape(REF_END)}\s*)?"
    rf"{re.escape(DET)}(?P<boxes>[^<]*){re.escape(DET_END)}"
)


def boxes_to_tags(boxes: Iterable[Box], width: float, height: float) -> str:
    """Named boxes in pixels as DeepSeek-VL2 writes them; those of one name that follow each other together.

    Boxes are cut off at the picture's edges and rounded. One that is thinner than the distance of two numbers
    is widened to it, so that every box that is written can be read back.

    Raises InputError: a picture without area; a box without area or outside of the picture; a name with tags.
    """
    check_size(width, height)
    text = ""
    for name, group in groupby(boxes, key=lambda box: box.name):
        places = ", ".join(str(_to_numbers(box, width, height)) for box in group)
        text += f"{reference(name) if name else ''}{DET}[{places}]{DET_END}"
    return text


def reference(name: str) -> str:
    """The name of a part of a picture, with its tags: as a prompt, it asks where that is.

    Raises InputError: an empty name, or one with tags in it.
    """
    if not name.strip() or "<|" in name:
        raise InputError(f"{name[:100]!r} cannot be found in a picture: give a name without tags")
    return f"{REF}{name}{REF_END}"


def _to_numbers(box: Box, width: float, height: float) -> list[int]:
    x0, y0, x1, y1 = box[:4]
    if not (x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise InputError(
            f"the box ({x0}, {y0}, {x1}, {y1}) has no area in a picture of {width} x {height}: expected x0 < "
            "x1 and y0 < y1, in pixels"
        )
    (left, right), (top, bottom) = _edges(x0, x1, width), _edges(y0, y1, height)
    return [left, top, right, bottom]


def _edges(low: float, high: float, side: float) -> tuple[int, int]:
    """Two edges as numbers, inside of the picture and at least one apart."""
    first, last = (round(min(max(edge / side, 0), 1) * LAST) for edge in (low, high))
    first = min(first, LAST - 1)
    return first, max(last, first + 1)


def tags_to_boxes(text: str, width: float, height: float) -> list[Box]:
    """The boxes in an answer, in pixels of a width x height picture. Any text is accepted.

    Boxes have the name before them. What a model wrote in another form, outside of the picture or without
    area is skipped: a wrong answer is not invalid input.

    Raises InputError: a picture without area.
    """
    check_size(width, height)
    boxes = []
    for match in _FOUND.finditer(text):
        if not _BOXES.fullmatch(match["boxes"].strip()):
            continue
        for inside in re.findall(_BOX, match["boxes"]):
            x0, y0, x1, y1 = (int(digits) / LAST for digits in re.findall("[0-9]+", inside))
            if x0 < x1 <= 1 and y0 < y1 <= 1:
                name = (match["name"] or "").strip()
                boxes.append(Box(x0 * width, y0 * height, x1 * width, y1 * height, name))
    return boxes


def check_tags(text: str) -> None:
    """Raise InputError: a tag of a name or a place does not close, or boxes are in another form."""
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if opened is None and tag[0] in (REF, DET):
            opened = tag
            continue
        if opened is None or tag[0] != opened[0].replace("<|", "<|/"):
            break
        if tag[0] == DET_END:
            check_boxes(text[opened.end() : tag.start()])
        opened = None
    else:
        if opened is None:
            return
    wrong = opened[0] if opened is not None else tag[0]
    raise InputError(
        f"{wrong} has no partner in {text[:100]!r}: a name stands between {REF} and {REF_END}, boxes stand "
        f"between {DET} and {DET_END}"
    )


def check_boxes(text: str) -> None:
    """Raise InputError unless this is a list of boxes as they stand in a tag."""
    numbers: Sequence[int] = [int(digits) for digits in re.findall("[0-9]+", text)]
    if not _BOXES.fullmatch(text.strip()) or max(numbers, default=math.inf) > LAST:
        raise InputError(
            f"boxes are {text[:100]!r}: expected left, top, right and bottom edge of each, from 0 to {LAST}, "
            "as [[120, 340, 560, 780]]"
        )
