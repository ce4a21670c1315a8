"""The checks of 08_boxes_and_masks accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from notebooks_and_sources import ROOT, read_cells
from PIL import Image

from minivlm import checks
from minivlm.checks import NotYet

NOTEBOOK = ROOT / "notebooks" / "08_boxes_and_masks.ipynb"
EXERCISES = (
    "tokens_to_box",
    "iou",
    "precision_over_recalls",
    "paste_mask",
    "expected_drawings",
    "diagnose",
)

Edges = Sequence[float]


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def read_as(order: str, steps: float = 1023.0, pixels: bool = True, swap: bool = False) -> Callable[..., Any]:
    """Reads the four words as numbers with these names, and returns x0, y0, x1, y1."""

    def read(text: str, width: float, height: float) -> tuple[float, ...]:
        numbers = [int(digits) / steps for digits in re.findall(r"\d{4}", text)]
        named = dict(zip(order.split(), numbers, strict=True))
        across, down = (width, height) if pixels else (1.0, 1.0)
        across, down = (down, across) if swap else (across, down)
        return named["x0"] * across, named["y0"] * down, named["x1"] * across, named["y1"] * down

    return read


def returned_yx(text: str, width: float, height: float) -> tuple[float, ...]:
    x0, y0, x1, y1 = read_as("y0 x0 y1 x1")(text, width, height)
    return y0, x0, y1, x1


def overlap(a: Edges, b: Edges, cut: bool = True, one: float = 0.0) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0]) + one
    down = min(a[3], b[3]) - max(a[1], b[1]) + one
    return max(0.0, across) * max(0.0, down) if cut else across * down


def area(box: Edges, one: float = 0.0) -> float:
    return (box[2] - box[0] + one) * (box[3] - box[1] + one)


def iou_with(cut: bool = True, one: float = 0.0, guard: bool = True) -> Callable[[Edges, Edges], float]:
    def iou(a: Edges, b: Edges) -> float:
        both = overlap(a, b, cut, one)
        either = area(a, one) + area(b, one) - both
        return 0.0 if guard and either <= 0 else both / either

    return iou


def cut_late(a: Edges, b: Edges) -> float:
    """Only one of the two overlaps is clamped at 0."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = min(a[3], b[3]) - max(a[1], b[1])
    either = area(a) + area(b) - across * down
    return across * down / either if either > 0 else 0.0


def enclosing(a: Edges, b: Edges) -> float:
    """Right for boxes of equal size in line, wrong for one inside the other."""
    both = max(0.0, min(a[2] - b[0], b[2] - a[0])) * max(0.0, min(a[3] - b[1], b[3] - a[1]))
    either = area(a) + area(b) - both
    return both / either if either > 0 else 0.0


def curve(hits: Sequence[bool], wanted: int) -> tuple[np.ndarray, np.ndarray]:
    right = np.cumsum(hits)
    return right / wanted, right / np.arange(1, len(hits) + 1)


def precision_with(
    best: bool = True, of: str = "wanted", beyond: float = 0.0, recalls: int = 101, first: int = 0
) -> Callable[[Sequence[bool], int], float]:
    """Average precision with one mistake."""

    def average(hits: Sequence[bool], wanted: int) -> float:
        if not hits:
            return 0.0
        recall, precision = curve(hits, wanted if of == "wanted" else max(1, sum(hits)))
        if best:
            precision = np.maximum.accumulate(precision[::-1])[::-1]
        values = []
        for least in np.linspace(0, 1, recalls)[first:]:
            places = np.flatnonzero(recall >= least - (1e-12 if best else 0))
            after = [place for place in places if precision[place] > 0]  # skips recall 0 with nothing right
            values.append(precision[after[0]] if after else beyond * precision[-1])
        return float(np.sum(values) / recalls)

    return average


def first_reached(hits: Sequence[bool], wanted: int) -> float:
    """Precision at the first box that reaches a recall; recall 0 is reached at the very first."""
    recall, precision = curve(hits, wanted)
    places = [np.flatnonzero(recall >= least) for least in np.linspace(0, 1, 101)]
    return float(np.mean([precision[place[0]] if len(place) else 0.0 for place in places]))


def area_under(hits: Sequence[bool], wanted: int) -> float:
    recall, precision = curve(hits, wanted)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def beyond_only(hits: Sequence[bool], wanted: int) -> float:
    recall, precision = curve(hits, wanted)
    return float(np.mean([precision[recall > r].max(initial=0.0) for r in np.linspace(0, 1, 101)]))


def reached_only(hits: Sequence[bool], wanted: int) -> float:
    recall, precision = curve(hits, wanted)
    values = [precision[recall >= least].max() for least in np.linspace(0, 1, 101) if (recall >= least).any()]
    return float(np.mean(values))


def paste_with(
    threshold: float = 0.0,
    early: str = "",
    how: Image.Resampling = Image.Resampling.BILINEAR,
    rounding: Callable[[float], int] = int,
    place: str = "xy",
    inside: bool = True,
) -> Callable[..., np.ndarray]:
    """Pastes with one mistake."""

    def paste(values: np.ndarray, box: Edges, width: int, height: int) -> np.ndarray:
        x0, y0, x1, y1 = (rounding(edge) for edge in box)
        if early == "float":
            values = (values > 0).astype(np.float32)
        if early == "bytes":
            values = (values > 0).astype(np.uint8) * 255
        drawn = np.asarray(Image.fromarray(values).resize((x1 - x0, y1 - y0), how)) > threshold
        drawn = drawn if inside else ~drawn
        mask = np.zeros((height, width), dtype=bool)
        if place == "yx":
            mask[x0 : x0 + y1 - y0, y0 : y0 + x1 - x0] = drawn
        else:
            mask[y0:y1, x0:x1] = drawn
        return mask

    return paste


def exchanged_size(values: np.ndarray, box: Edges, width: int, height: int) -> np.ndarray:
    x0, y0, x1, y1 = (int(edge) for edge in box)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = np.asarray(Image.fromarray(values).resize((y1 - y0, x1 - x0))) > 0
    return mask


paste = checks.pointing.solutions.paste_mask


def turned_over(values: np.ndarray, box: Edges, width: int, height: int) -> np.ndarray:
    return paste(np.ascontiguousarray(values.T), box, width, height)


TRUE = checks.pointing.solutions.expected_drawings()
MEASURED = {
    "circle by column": 0.97,
    "square by column": 1.0,
    "triangle by column": 0.4,
    "star by column": 0.6,
    "square shuffled": 0.98,
}


def mistaken(fault: str, name: str) -> Callable[..., str]:
    """Right for all readers but one."""

    def diagnose(reader: Any, figure: Any) -> str:
        found = checks.pointing.solutions.diagnose(reader, figure)
        return name if found == fault else found

    return diagnose


def seen_by(shape: str, places: str, width: int, height: int) -> Callable[..., str]:
    """The solution with another figure, or another box and picture."""

    def diagnose(reader: Any, figure: Any) -> str:
        text = places + figure(shape)[0]
        box, mask = reader(text, width, height)
        true_box, true_mask = checks.pointing._reader("none")(text, width, height)
        if not np.allclose(box, true_box):
            return "1024" if np.allclose(np.array(box) * 1024 / 1023, true_box) else "x before y"
        if overlap_of_masks(mask, true_mask) > 0.999:
            return "none"
        return "columns" if (mask & ~true_mask).any() else "threshold"

    return diagnose


def overlap_of_masks(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


by_a_circle = seen_by("square", "<loc0000><loc0100><loc0500><loc1023>", 40, 20)
in_a_square = seen_by("triangle", "<loc0100><loc0100><loc1023><loc1023>", 100, 100)

WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("tokens_to_box", read_as("x0 y0 x1 y1"), "mirrored about the diagonal"),
    ("tokens_to_box", returned_yx, "return x0, y0, x1, y1"),
    ("tokens_to_box", read_as("y0 x0 y1 x1", swap=True), "width and height are swapped"),
    ("tokens_to_box", read_as("y0 x0 y1 x1", steps=1024), "divide by 1024"),
    ("tokens_to_box", read_as("y0 x0 y1 x1", pixels=False), "shares of the picture"),
    ("tokens_to_box", read_as("y0 x0 y1 x1", steps=1, pixels=False), "numbers of the words"),
    ("tokens_to_box", read_as("y1 x1 y0 x0"), "expected \\(48"),
    ("tokens_to_box", lambda *a: [round(edge) for edge in read_as("y0 x0 y1 x1")(*a)], "do not round"),
    ("tokens_to_box", lambda *a: [int(edge) for edge in read_as("y0 x0 y1 x1")(*a)], "do not round"),
    ("tokens_to_box", lambda text, w, h: (1.0, 2.0), "expected four numbers, x0, y0, x1, y1, got 2"),
    ("tokens_to_box", lambda text, w, h: text, "got a str"),
    ("tokens_to_box", lambda text, w, h: read_as("y0 x0 y1 x1")(text, 200, 120), "whole picture"),
    ("iou", lambda a, b: overlap(a, b) / (area(a) + area(b)), "counted twice"),
    ("iou", lambda a, b: overlap(a, b) / area(a), "area of one box"),
    ("iou", iou_with(one=1.0), "without \\+ 1"),
    ("iou", iou_with(cut=False), "product of two negative"),
    ("iou", cut_late, "negative IoU"),
    ("iou", enclosing, "inside a box of area 100"),
    ("iou", iou_with(guard=False), "division by zero"),
    ("iou", lambda a, b: 0.5, "not 0.5"),
    (
        "iou",
        lambda a, b: (S := checks.pointing.solutions).iou(a[::-1], b[::-1]) or S.iou(a, b) / 2,
        "0.6, not",
    ),
    ("iou", lambda a, b: (a, b), "one number"),
    ("precision_over_recalls", precision_with(best=False), "best precision at that recall or beyond"),
    ("precision_over_recalls", first_reached, "best precision at that recall or beyond"),
    ("precision_over_recalls", precision_with(recalls=100), "over 100 recalls"),
    ("precision_over_recalls", precision_with(of="found"), "no recall beyond 2/3"),
    ("precision_over_recalls", reached_only, "no recall beyond 2/3"),
    ("precision_over_recalls", precision_with(recalls=11), "PASCAL VOC"),
    ("precision_over_recalls", area_under, "area under the curve"),
    ("precision_over_recalls", precision_with(first=1), "recall 0 is one"),
    ("precision_over_recalls", lambda hits, wanted: 0.5, "not 0.5"),
    ("precision_over_recalls", beyond_only, "at or beyond, >="),
    ("precision_over_recalls", precision_with(best=False, beyond=1.0), "got the last precision"),
    ("precision_over_recalls", lambda hits, wanted: float(curve(hits, wanted)[1].mean()), "mean over boxes"),
    ("precision_over_recalls", lambda hits, wanted: curve(hits, wanted), "one number"),
    ("precision_over_recalls", lambda hits, wanted: 67 / 101 * 2 / 3, "yours is"),
    ("paste_mask", exchanged_size, "resize takes \\(width, height\\)"),
    ("paste_mask", lambda v, b, w, h: v, "drawing alone"),
    ("paste_mask", lambda v, b, w, h: paste(v, b, w, h).T, "rows first"),
    ("paste_mask", lambda v, b, w, h: paste(v, b, w, h).astype(int), "should hold bools"),
    ("paste_mask", lambda v, b, w, h: paste(v, b, w, h)[:-1], "expected \\[50, 90\\]"),
    ("paste_mask", paste_with(threshold=0.5), "outline is at 0"),
    ("paste_mask", paste_with(early="float"), "compare with 0 first"),
    ("paste_mask", paste_with(early="bytes"), "compare with 0 first"),
    ("paste_mask", paste_with(early="float", threshold=0.5), "compare with 0 first"),
    ("paste_mask", paste_with(how=Image.Resampling.NEAREST), "is jagged"),
    ("paste_mask", paste_with(place="yx"), "\\(y, x\\) instead of \\(x, y\\)"),
    ("paste_mask", paste_with(inside=False), "inside and outside"),
    ("paste_mask", lambda v, b, w, h: ~paste(v, b, w, h), "outside the box"),
    ("paste_mask", paste_with(rounding=round), "rounded the edges"),
    ("paste_mask", turned_over, "over its diagonal"),
    ("expected_drawings", lambda: TRUE | {"circle by column": "broken"}, "symmetric about its diagonal"),
    ("expected_drawings", lambda: TRUE | {"square by column": "broken"}, "IoU of 1.00"),
    ("expected_drawings", lambda: TRUE | {"triangle by column": "same"}, "triangle that points up"),
    ("expected_drawings", lambda: TRUE | {"star by column": "same"}, "star that points up"),
    ("expected_drawings", lambda: TRUE | {"square shuffled": "broken"}, "in whatever order"),
    ("expected_drawings", lambda: dict.fromkeys(TRUE, "broken"), "circle by column: you expect 'broken'"),
    ("expected_drawings", lambda: dict.fromkeys(TRUE, "same"), "triangle by column: you expect 'same'"),
    ("expected_drawings", lambda: TRUE | {"square shuffled": True}, "cannot be held against a number"),
    ("expected_drawings", lambda: TRUE | {"star shuffled": "broken"}, "none of the five drawings"),
    ("expected_drawings", lambda: {"circle by column": "same"}, "a prediction is missing"),
    ("expected_drawings", lambda: ["same"] * 5, "return a dictionary"),
    ("diagnose", lambda reader, figure: "none", "every reader gets the diagnosis 'none'"),
    ("diagnose", lambda reader, figure: "columns", "every reader gets the diagnosis 'columns'"),
    ("diagnose", lambda reader, figure: "the codes", "return one of"),
    ("diagnose", mistaken("x before y", "none"), "wider than high"),
    ("diagnose", mistaken("1024", "none"), "Use the word 1023"),
    ("diagnose", mistaken("columns", "none"), "figure without symmetry"),
    ("diagnose", mistaken("threshold", "none"), "every pixel"),
    ("diagnose", mistaken("columns", "threshold"), "also adds some"),
    ("diagnose", mistaken("threshold", "columns"), "only takes pixels away"),
    ("diagnose", mistaken("x before y", "1024"), "same factor"),
    ("diagnose", mistaken("1024", "x before y"), "same factor"),
    ("diagnose", mistaken("1024", "threshold"), "look at the box first"),
    ("diagnose", mistaken("columns", "1024"), "though the box is right"),
    ("diagnose", mistaken("none", "columns"), "healthy reader"),
    ("diagnose", by_a_circle, "figure without symmetry"),
    ("diagnose", in_a_square, "wider than high"),
]


def check(name: str, answer: Callable[..., Any]) -> None:
    given = [MEASURED.__getitem__] if name == "expected_drawings" else []
    getattr(checks.pointing, name)(answer, *given)


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        check(name, blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        check(name, answer)


def test_other_ways_to_be_right() -> None:
    checks.pointing.precision_over_recalls(precision_with())
    checks.pointing.diagnose(checks.pointing.solutions.diagnose)
    checks.pointing.expected_drawings(lambda: TRUE, MEASURED.__getitem__)
    checks.pointing.expected_drawings(lambda: TRUE)
    checks.pointing.tokens_to_box(lambda *args: list(checks.pointing.solutions.tokens_to_box(*args)))
    checks.pointing.iou(lambda a, b: np.float64(iou_with()(a, b)))


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
