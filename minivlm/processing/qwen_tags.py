"""Qwen-VL's tags (https://arxiv.org/abs/2308.12966): pictures, names and places inside of a text.

    <img>path</img>                           a picture
    <ref>the cat</ref>                        what the text calls a part of it
    <box>(120,340),(560,780)</box>            left, top, right and bottom edge
    <quad>(1,2),(9,2),(9,8),(1,8)</quad>      four corners, of written words

A coordinate is a whole number from 0 to 999 of the picture's width or height, in digits. PaliGemma (boxes.py)
has a word for each of its 1024 places, and puts y before x. A text is also a list of what it consists of, in
the form of the published program:

    [{"image": "1.jpg"}, {"text": "where is "}, {"ref": "the cat"}]
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from minivlm.errors import InputError
from minivlm.processing.boxes import Box, check_size

PLACES = 1000  # along each side
KINDS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}  # a tag's name, and that of its element
CORNERS = {"box": 2, "quad": 4}

Element = Mapping[str, Any]  # {kind: what it holds}; a box may also have a "ref"

_TAG = re.compile(rf"</?(?:{'|'.join(KINDS)})>")
_NUMBER = r"\s*[0-9]{1,4}\s*"
_CORNER = rf"\({_NUMBER},{_NUMBER}\)"
_NAMED_BOX = re.compile(r"(?:<ref>(?P<name>(?:(?!</?ref>).)*)</ref>)?(?P<boxes>(?:<box>[^<]*</box>)+)", re.S)


def to_list_format(text: str) -> list[dict[str, str]]:
    """Split a text at its tags: {"text": ...}, {"image": path}, {"ref": ...}, {"box": ...}, {"quad": ...}.

    What stands inside of tags is taken as it is; `text_to_corners` reads places. As in the published program,
    which this equals, the text is brought to Unicode's form NFC, and a tag that nothing has opened is text.

    Raises InputError: a tag does not close.
    """
    return [{kind: inside} for kind, inside in _split(unicodedata.normalize("NFC", text), KINDS)]


def check_tags(text: str) -> None:
    """Raise InputError: a `<ref>`, `<box>` or `<quad>` does not close, or a place is as `text_to_corners`."""
    for kind, inside in _split(text, [tag for tag in KINDS if tag != "img"]):
        if kind in CORNERS:
            text_to_corners(inside, kind)


def _split(text: str, tags: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The kinds of a text's parts, and what is in them."""
    rest, opening = text, re.compile(rf"<({'|'.join(tags)})>")
    while found := opening.search(rest):
        tag = found[1]
        inside, closed, after = rest[found.end() :].partition(f"</{tag}>")
        if not closed:
            raise InputError(f"<{tag}> does not close in {text[:100]!r}: write </{tag}> after what it holds")
        if found.start():
            yield "text", rest[: found.start()]
        yield KINDS[tag], inside
        rest = after
    if rest:
        yield "text", rest


def from_list_format(elements: Iterable[Element]) -> str:
    """The text of a list of elements.

    A picture is a line of its own, "Picture 1:<img>path</img>". A box is four numbers, or a list of such for
    several; its "ref" comes before it. Numbers are cut to whole ones. Beyond the published program, which
    this equals for what it takes, a "ref" may stand alone, a "quad" has eight numbers, and a place may be
    text, as `to_list_format` gives it.

    Raises InputError: another element; a path or a name with tags; a place outside of the picture or with
    another number of corners.
    """
    text, pictures = "", 0
    for element in elements:
        if is_picture(element):
            pictures += 1
            text += f"{picture_label(pictures)}<img>{_without_tags(element['image'])}</img>\n"
        else:
            text += element_text(element)
    return text


def is_picture(element: Element) -> bool:
    """Whether an element is a picture."""
    return "image" in element


def picture_label(number: int) -> str:
    """What stands before a picture in a chat; pictures count from 1."""
    return f"Picture {number}:"


def element_text(element: Element) -> str:
    """The text of an element that is no picture, with its tags. Raises InputError: as `from_list_format`."""
    if "text" in element:
        return str(element["text"])
    kind = next((kind for kind in CORNERS if kind in element), None)
    if kind is None and "ref" not in element:
        raise InputError(
            f"{dict(element)} is no part of a text: expected a key of image, text, ref, box and quad"
        )
    text = f"<ref>{_without_tags(element['ref'])}</ref>" if "ref" in element else ""
    places = [] if kind is None else _places(element[kind], kind)
    return text + "".join(f"<{kind}>{place}</{kind}>" for place in places)


def _without_tags(value: object) -> str:
    """A name or a path as it is. Raises InputError: it has a tag."""
    if _TAG.search(str(value)):
        raise InputError(f"{str(value)[:100]!r} has a tag in it, which could not be read back: remove it")
    return str(value)


def _places(value: Any, kind: str) -> list[str]:
    """Each place of an element as text."""
    if isinstance(value, str):
        text_to_corners(value, kind)
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise InputError(f"a {kind} is {value!r}: expected {2 * CORNERS[kind]} numbers, or a list of such")
    texts = []
    for numbers in value if isinstance(value[0], Sequence) else [value]:
        check_places(numbers, kind)
        corners = zip(numbers[::2], numbers[1::2], strict=True)
        texts.append(",".join(f"({int(x)},{int(y)})" for x, y in corners))
    return texts


def check_places(numbers: Sequence[float], kind: str = "box") -> None:
    """Raise InputError unless these are the corners of a box or quad, x before y, all in [0, 1000)."""
    if len(numbers) != 2 * CORNERS[kind]:
        raise InputError(f"a {kind} has {len(numbers)} numbers: expected {2 * CORNERS[kind]}, x before y")
    for number in numbers:
        if not 0 <= number < PLACES:  # nor NaN
            raise InputError(
                f"a {kind} has {number}: expected numbers from 0 to {PLACES - 1}, thousandths of the "
                "picture's width or height"
            )


def text_to_corners(text: str, kind: str = "box") -> list[int]:
    """What a `<box>` or `<quad>` holds, "(1,2),(3,4)", as numbers x, y, x, y.

    Raises InputError: another form, another number of corners, a number outside [0, 1000).
    """
    if not re.fullmatch(rf"\s*{_CORNER}(?:\s*,\s*{_CORNER})*\s*", text):
        raise InputError(f"a {kind} holds {text[:100]!r}: expected corners, as (1,2),(3,4)")
    numbers = [int(digits) for digits in re.findall("[0-9]+", text)]
    check_places(numbers, kind)
    return numbers


def box_to_tag(box_xyxy: Sequence[float] | Box, width: float, height: float) -> str:
    """`<box>` for a box x0, y0, x1, y1 in pixels of a width x height picture, which is cut off at its edges.

    A coordinate is rounded down, and the picture's last edge is 999. A box thinner than a thousandth is
    widened to one, so that every box that is written can be read back.

    Raises InputError: a picture without area; a box without area or outside of the picture, or with too few
    numbers.
    """
    check_size(width, height)
    if len(box_xyxy) < 4:
        raise InputError(f"the box has {len(box_xyxy)} numbers: expected x0, y0, x1, y1")
    x0, y0, x1, y1 = (float(value) for value in box_xyxy[:4])
    if not (x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise InputError(
            f"the box ({x0}, {y0}, {x1}, {y1}) has no area in a picture of {width} x {height}: expected x0 < "
            "x1 and y0 < y1, in pixels"
        )
    (left, right), (top, bottom) = _edges(x0, x1, width), _edges(y0, y1, height)
    return f"<box>({left},{top}),({right},{bottom})</box>"


def _edges(low: float, high: float, side: float) -> tuple[int, int]:
    """Two edges in thousandths, inside of the picture and at least one apart."""
    first, last = (min(max(math.floor(edge / side * PLACES), 0), PLACES - 1) for edge in (low, high))
    first = min(first, PLACES - 2)
    return first, max(last, first + 1)


def boxes_to_tags(boxes: Iterable[Box], width: float, height: float) -> str:
    """Named boxes as Qwen-VL writes them: "<ref>name</ref><box>(..),(..)</box>...".

    Raises InputError: as `box_to_tag`; a name with tags.
    """
    text = ""
    for box in boxes:
        name = f"<ref>{_without_tags(box.name)}</ref>" if box.name else ""
        text += name + box_to_tag(box, width, height)
    return text


def tags_to_boxes(text: str, width: float, height: float) -> list[Box]:
    """The boxes in an answer, in pixels of a width x height picture. Any text is accepted.

    A box has the name before it, and so have further boxes behind it. A share is the number by 1000, as the
    published program draws it (its evaluation on RefCOCO divides by 999). What a model wrote in another form,
    outside of the picture or without area is skipped: a wrong answer is not invalid input.

    Raises InputError: a picture without area.
    """
    check_size(width, height)
    boxes = []
    for match in _NAMED_BOX.finditer(text):
        for inside in re.findall(r"<box>([^<]*)</box>", match["boxes"]):
            try:
                x0, y0, x1, y1 = (number / PLACES for number in text_to_corners(inside))
            except InputError:
                continue
            if x0 < x1 and y0 < y1:
                name = (match["name"] or "").strip()
                boxes.append(Box(x0 * width, y0 * height, x1 * width, y1 * height, name))
    return boxes
