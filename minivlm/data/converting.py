"""From annotated pictures in any format to this project's lines, a picture at a time.

    {"image": "photos/1.jpg", "prefix": "detect cat ; dog", "suffix": "<loc0256>...<loc0895> cat ; ... dog"}

Every picture is asked for the same classes, also for those that it does not show: a prompt that named only
what is there would give the answer away, and nobody could say "none". Objects come in the order of the
classes, those of one class from left to right.

A picture is written with all of its objects or not at all: an answer that leaves out an object teaches to
overlook it. So one broken box makes its picture a bad one, which is named, and the others are converted.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags

from minivlm.data import shapes
from minivlm.data.annotated import Annotated, BadPicture, Corners, Entry, Source, Task, Thing
from minivlm.data.lines import MAX_REASONS, check_picture
from minivlm.errors import InputError
from minivlm.files import check_output, write_aside
from minivlm.processing import Box, MaskCodebook, boxes_to_text, load_picture, mask_to_tokens
from minivlm.processing.images import open_header

PROMPTS: dict[Task, str] = {
    "detect": "detect {classes}",
    "segment": "segment {classes}",
    "caption": "caption en",
    "classify": "what is it?",
    "pairs": "",  # lines for two towers have none
}
CLASSES = "{classes}"
_SEPARATES = re.compile(r";|<(?:loc|seg)[0-9]+>")


@dataclass(frozen=True)
class LineForm:
    """What the user wants the lines to be."""

    task: Task
    prompt: str | None = None  # None: that of the task; {classes} stands for the names that are asked for
    ask: Literal["all", "present"] = "all"  # for which classes
    classes: tuple[str, ...] = ()  # only these, in this order; none: all
    empty_answer: str | None = None  # of a picture without objects; None leaves it out
    every_answer: bool = False  # where a picture has several answers to one prompt: all instead of the first
    frame: Literal["upright", "stored"] | None = None  # what numbers refer to; None: what the sizes say
    codebook: MaskCodebook | None = None  # None: the shipped one


@dataclass
class Report:
    """What became of a source."""

    pictures: int = 0
    lines: int = 0
    objects: Counter[str] = field(default_factory=Counter)  # by class
    left_out: Counter[str] = field(default_factory=Counter)  # by what it is, without being a mistake
    bad: list[BadPicture] = field(default_factory=list)


class BadPictures(InputError):
    """Pictures that no line is written for. `reasons` names the first of them, one each."""

    def __init__(self, bad: Sequence[BadPicture], summary: str, advice: str) -> None:
        self.summary, self.advice = summary, advice
        self.reasons = [f"{one.name}: {one.reason}" for one in bad[:MAX_REASONS]]
        if len(bad) > MAX_REASONS:
            self.reasons.append(f"and {len(bad) - MAX_REASONS} more")
        super().__init__(f"{summary}: {'; '.join(self.reasons)}. {advice}")


def convert(
    source: Source,
    form: LineForm,
    out: Path,
    watch: Callable[[Sequence[list[Entry]]], Iterable[list[Entry]]] = iter,
) -> Report:
    """Write the lines of all pictures into a new file, and say what was left out.

    Args:
        out: pictures are named relative to its folder, so that both can be moved together.
        watch: iterates over the pictures, and may show how far it is.

    Raises InputError: `out` exists or cannot be written; there is no picture, or none that a line can be
    written for; a class has no name that can stand in a prompt.
    """
    check_output(out, replace=False)
    pictures = _by_picture(source.entries)
    if not pictures:
        raise InputError("there are no pictures in it: check its path")
    form = replace(form, classes=_classes(source, pictures, form))
    report, known = Report(), set[Path]()
    with write_aside(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for entries in watch(pictures):
            try:
                lines = _lines_of(_merged(entries), form, out.parent, report, known)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                _check_text(text)
            except InputError as error:
                bad = next((one for one in entries if isinstance(one, BadPicture)), entries[0])
                report.bad.append(BadPicture(bad.name, str(error)))
                continue
            file.write(text)
            report.lines += len(lines)
            report.pictures += len(lines) > 0
        if not report.lines:
            _refuse_nothing(report, len(pictures))
    return report


def _by_picture(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries about the same file together, in the order in which the files appear."""
    found: dict[str | int, list[Entry]] = {}
    for number, entry in enumerate(entries):
        key = number if entry.path is None else os.path.abspath(entry.path)
        found.setdefault(key, []).append(entry)
    return list(found.values())


def _merged(entries: Sequence[Entry]) -> Annotated:
    """All that is known about one picture. Raises InputError: some of it is bad, or they disagree."""
    good: list[Annotated] = []
    for entry in entries:
        if isinstance(entry, BadPicture):
            raise InputError(entry.reason)
        good.append(entry)
    first = good[0]
    if len({(entry.size, entry.shares) for entry in good}) > 1:
        raise InputError(f"it appears {len(good)} times, with different sizes: leave one of them")
    return replace(
        first,
        things=tuple(dict.fromkeys(thing for entry in good for thing in entry.things)),
        texts=tuple(dict.fromkeys(text for entry in good for text in entry.texts)),
        crowds=sum(entry.crowds for entry in good),
    )


def _classes(source: Source, pictures: Sequence[Sequence[Entry]], form: LineForm) -> tuple[str, ...]:
    """The names that prompts may ask for, in their order: as the source has them, or by the alphabet."""
    entries = (entry for group in pictures for entry in group if isinstance(entry, Annotated))
    found = {thing.name for entry in entries for thing in entry.things}
    known = list(dict.fromkeys(source.classes)) or sorted(found)
    unknown = [name for name in form.classes if name not in known]
    if unknown:
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise InputError(f"there is no class {unknown[0]!r}: choose from {listed or 'none'}")
    chosen = tuple(dict.fromkeys(form.classes)) or tuple(known)
    if form.task in ("detect", "segment"):
        wrong = [name for name in chosen if not name or _SEPARATES.search(name)]
        if wrong:
            raise InputError(
                f"the class {wrong[0]!r} has a ';', a coordinate or nothing as its name, which separate "
                "objects in an answer: rename it, or choose others with --classes"
            )
    return chosen


def _refuse_nothing(report: Report, count: int) -> None:
    left = ", ".join(f"{number} {what}" for what, number in report.left_out.items())
    if report.bad:
        raise BadPictures(
            report.bad,
            f"nothing is written, since {len(report.bad)} of {count} entries are bad"
            + (f", and others are left out ({left})" if left else ""),
            "Where pictures are missing, say where they lie with --images",
        )
    raise InputError(
        f"nothing is written, since everything was left out: {left}. Another --task may fit, and pictures "
        "without objects are kept with --empty-answer none"
    )


# ---- the lines of one picture ------------------------------------------------------------------------------


def _lines_of(
    picture: Annotated, form: LineForm, folder: Path, report: Report, known: set[Path]
) -> list[dict[str, str]]:
    """None, one or several. Raises InputError: its file or an object is bad."""
    check_picture(picture.path, known)
    image = _relative(picture.path, folder)
    if form.task in ("caption", "classify", "pairs"):
        return _text_lines(picture, image, form, report)
    things = [thing for thing in picture.things if thing.name in form.classes]
    names = [thing.name for thing in things]
    frame = read_frame(picture.path)
    parts = [_written(thing, picture, frame, form) for thing in things]
    left_out = {"crowds": picture.crowds, "objects of other classes": len(picture.things) - len(things)}
    report.left_out.update({what: count for what, count in left_out.items() if count})
    if not things and picture.crowds:
        report.left_out["pictures with nothing but crowds"] += 1
        return []
    if not things and form.empty_answer is None:
        report.left_out["pictures without objects"] += 1
        return []
    asked = form.classes if form.ask == "all" or not things else [c for c in form.classes if c in names]
    if not asked:
        raise InputError("it has no objects, and no class is known that could be asked for")
    report.objects.update(names)
    # By class, then from left to right: the words of a box begin with y0 and x0, 9 characters each.
    order = sorted(
        (form.classes.index(name), part[9:18], part) for name, part in zip(names, parts, strict=True)
    )
    answer = " ; ".join(part for *_, part in order) or form.empty_answer or ""
    return [{"image": image, "prefix": _prompt(form, asked), "suffix": answer}]


def _text_lines(picture: Annotated, image: str, form: LineForm, report: Report) -> list[dict[str, str]]:
    answers: dict[str, list[str]] = {}
    for prompt, answer in picture.texts:
        asked = "" if form.task == "pairs" else prompt or _prompt(form, form.classes)
        answers.setdefault(asked, []).append(answer)
    if not answers:
        report.left_out["pictures without a text"] += 1
    more = sum(len(several) - 1 for several in answers.values())
    if more and not form.every_answer:
        report.left_out["further answers to the same prompt"] += more
        answers = {prompt: several[:1] for prompt, several in answers.items()}
    if form.task == "pairs":
        return [{"image": image, "text": text} for text in answers.get("", ())]
    return [
        {"image": image, "prefix": prompt, "suffix": answer}
        for prompt, several in answers.items()
        for answer in several
    ]


def _prompt(form: LineForm, classes: Sequence[str]) -> str:
    prompt = PROMPTS[form.task] if form.prompt is None else form.prompt
    return prompt.replace(CLASSES, " ; ".join(classes))


def _check_text(text: str) -> None:
    """Raises InputError: what UTF-8 cannot hold, such as a file name that is no text, or half a surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("its name or its text is not UTF-8, as JSON has to be: change it") from error


def _relative(path: Path, folder: Path) -> str:
    """The path of a picture as a line has it."""
    try:
        relative = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
    except ValueError:  # on another drive of Windows
        relative = os.path.abspath(path)
    return Path(relative).as_posix()


# ---- boxes and shapes --------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A picture as it is stored, and how EXIF turns it: 1 to 8, where 1 leaves it as it is."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture that a model sees."""
        turned = self.orientation in shapes.SWAPPED
        return (self.height, self.width) if turned else (self.width, self.height)


def read_frame(path: Path) -> Frame:
    """Raises InputError: it is no picture."""
    with open_header(path) as image:
        if image.format == "TIFF":  # Pillow turns these when they are loaded
            return Frame(*load_picture(path).size, 1)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Frame(*image.size, orientation if orientation in shapes.METHODS else 1)


def _written(thing: Thing, picture: Annotated, frame: Frame, form: LineForm) -> str:
    """An object as it stands in an answer. Raises InputError: its numbers make no sense."""
    turn = _turn_of_numbers(picture, frame, form)
    width, height = (1.0, 1.0) if picture.shares else picture.size or _size_meant(frame, turn)
    box = _box(thing, width, height)
    corners = [
        shapes.turn_point(x / width, y / height, turn) for x, y in ((box[0], box[1]), (box[2], box[3]))
    ]
    (x0, x1), (y0, y1) = map(sorted, zip(*corners, strict=True))
    if form.task == "detect":
        return boxes_to_text([Box(x0, y0, x1, y1, thing.name)], 1, 1)
    across, down = frame.upright
    mask = _mask(thing, (width, height), frame, turn)
    whole = (x0 * across, y0 * down, x1 * across, y1 * down)
    return f"{mask_to_tokens(mask, whole, form.codebook)} {thing.name}"


def _turn_of_numbers(picture: Annotated, frame: Frame, form: LineForm) -> int:
    """How the numbers have to be turned: 1 if they are about the upright picture."""
    if form.frame is not None:
        return frame.orientation if form.frame == "stored" else 1
    if picture.size is None or picture.shares or picture.size == frame.upright:
        return 1
    if picture.size == (frame.width, frame.height):
        return frame.orientation
    stated = " x ".join(f"{side:g}" for side in picture.size)
    raise InputError(
        f"its annotation is about {stated} pixels, but it has {' x '.join(map(str, frame.upright))}: find "
        "the picture that was annotated, or, if it was only made smaller since, add --boxes upright"
    )


def _size_meant(frame: Frame, turn: int) -> tuple[float, float]:
    """What numbers refer to where the source does not say it."""
    return frame.upright if turn == 1 else (frame.width, frame.height)


def _box(thing: Thing, width: float, height: float) -> Corners:
    """Raises InputError: the box of an object has no area, or lies outside."""
    if thing.box is not None:
        box = thing.box
    elif thing.shape is None:
        raise InputError(f"an object of the class {thing.name!r} has neither a box nor a shape")
    elif isinstance(thing.shape, shapes.RunLengths):
        box = shapes.bounds_of_mask(thing.shape.to_mask())
    else:
        box = shapes.bounds_of_polygons(thing.shape)
    x0, y0, x1, y1 = box
    shown = ", ".join(f"{edge:g}" for edge in box)
    if not (x0 < x1 and y0 < y1):
        raise InputError(f"the box of {thing.name!r} has no area: x0, y0, x1, y1 are {shown}")
    if not (x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise InputError(
            f"the box of {thing.name!r} lies outside the picture of {width:g} x {height:g}: "
            f"x0, y0, x1, y1 are {shown}"
        )
    return box


def _mask(thing: Thing, size: tuple[float, float], frame: Frame, turn: int) -> np.ndarray:
    """The mask [height, width] of an object in the upright picture."""
    across, down = frame.upright
    if thing.shape is None:
        raise InputError(f"an object of the class {thing.name!r} has a box but no shape: use --task detect")
    if isinstance(thing.shape, shapes.RunLengths):
        mask = shapes.turn_mask(thing.shape.to_mask(), turn)
        if mask.shape != (down, across):
            raise InputError(
                f"the mask of {thing.name!r} is {mask.shape[1]} x {mask.shape[0]}, but the picture has "
                f"{across} x {down} pixels"
            )
        return mask
    parts = []
    for flat in thing.shape:
        points = [shapes.turn_point(x / size[0], y / size[1], turn) for x, y in shapes.points_of(flat)]
        parts.append(tuple(value for x, y in points for value in (x * across, y * down)))
    return shapes.draw_polygons(tuple(parts), across, down)
