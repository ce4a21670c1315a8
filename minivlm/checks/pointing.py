"""Checks for 08_boxes_and_masks: reading boxes, overlap, average precision, pasting masks, broken readers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.checks import NotYet, call, expect, right
from minivlm.processing import codes_to_text, load_codebook
from minivlm.processing.masks import mask_iou
from minivlm.training.codebook import Figure, shape_outline

Edges = Sequence[float]  # x0, y0, x1, y1
Reader = Callable[[str, int, int], tuple[Edges, np.ndarray]]

FAULTS = ("none", "x before y", "1024", "columns", "threshold")

# What becomes of a drawing when its codes are read in another order, and why.
ORDERS = {
    "circle by column": (
        "same",
        "rows and columns can be exchanged where a figure is symmetric about its diagonal",
    ),
    "square by column": (
        "same",
        "rows and columns can be exchanged where a figure is symmetric about its diagonal",
    ),
    "triangle by column": ("broken", "a triangle that points up has no symmetry about its diagonal"),
    "star by column": ("broken", "a star that points up has no symmetry about its diagonal"),
    "square shuffled": (
        "same",
        "a square fills its box, so that every code says much the same, in whatever order: all inside",
    ),
}


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def tokens_to_box(text: str, width: float, height: float) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in pixels from "<locYYYY><locXXXX><locYYYY><locXXXX>"."""
        y0, x0, y1, x1 = (int(digits) / 1023 for digits in re.findall(r"<loc(\d{4})>", text))
        return x0 * width, y0 * height, x1 * width, y1 * height

    @staticmethod
    def iou(a: Edges, b: Edges) -> float:
        """Area of the overlap of two boxes x0, y0, x1, y1 over that of their union; 0 if there is no area."""
        across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = across * down
        either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
        return both / either if either > 0 else 0.0

    @staticmethod
    def precision_over_recalls(hits: Sequence[bool], wanted: int) -> float:
        """Mean of the best precision at or beyond each recall 0, 0.01, ..., 1; the surest hits come first."""
        right = np.cumsum(hits)
        recall = right / wanted
        precision = right / np.arange(1, len(hits) + 1)
        reached = [precision[recall >= least].max(initial=0.0) for least in np.linspace(0, 1, 101)]
        return float(np.mean(reached))

    @staticmethod
    def paste_mask(values: np.ndarray, box: Edges, width: int, height: int) -> np.ndarray:
        """Bools [height, width]: the drawing [64, 64] resized to the box's whole pixels, True where > 0."""
        x0, y0, x1, y1 = (int(edge) for edge in box)
        drawn = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        mask = np.zeros((height, width), dtype=bool)
        mask[y0:y1, x0:x1] = np.asarray(drawn) > 0
        return mask

    @staticmethod
    def expected_drawings() -> dict[str, str]:
        """For each order, whether the drawing stays the "same" or is "broken"."""
        return {name: expected for name, (expected, _) in ORDERS.items()}

    @staticmethod
    def diagnose(reader: Reader, figure: Callable[[str], tuple[str, np.ndarray]]) -> str:
        """Which of FAULTS a reader of box and mask has, measured with one triangle in an oblong picture."""
        words, values = figure("triangle")
        text = "<loc0000><loc0100><loc0500><loc1023>" + words
        box, mask = reader(text, 200, 100)
        true_box = solutions.tokens_to_box(text, 200, 100)
        true_mask = solutions.paste_mask(values, true_box, 200, 100)
        if not np.allclose(box, true_box):
            return "1024" if np.allclose(np.array(box) * 1024 / 1023, true_box) else "x before y"
        if np.array_equal(mask, true_mask):
            return "none"
        return "columns" if (mask & ~true_mask).any() else "threshold"


def broken_readers() -> dict[str, Reader]:
    """Five readers of an answer, text, width and height -> box and mask. What each does wrong is not told."""
    return dict(
        zip("ABCDE", map(_reader, ("columns", "1024", "none", "threshold", "x before y")), strict=True)
    )


def _reader(fault: str) -> Reader:
    def read(text: str, width: int, height: int) -> tuple[Edges, np.ndarray]:
        numbers = [int(digits) for digits in re.findall(r"<loc(\d{4})>", text)[:4]]
        y0, x0, y1, x1 = (number / (1024 if fault == "1024" else 1023) for number in numbers)
        if fault == "x before y":
            x0, y0, x1, y1 = y0, x0, y1, x1
        box = (x0 * width, y0 * height, x1 * width, y1 * height)
        codes = torch.tensor([[int(digits) for digits in re.findall(r"<seg(\d{3})>", text)[:16]]])
        if fault == "columns":
            codes = codes.view(1, 4, 4).transpose(1, 2).reshape(1, 16)
        values = load_codebook().decode(codes)[0].numpy() - (0.5 if fault == "threshold" else 0.0)
        return box, solutions.paste_mask(values, box, width, height)

    return read


def figure(shape: str) -> tuple[str, np.ndarray]:
    """The sixteen words of a shape that stands upright and fills its box, and what they draw, [64, 64]."""
    codes = _codes_of(shape)
    return codes_to_text(codes[0]), load_codebook().decode(codes)[0].numpy()


def _figure_mask(shape: str) -> Tensor:
    return torch.from_numpy(Figure((shape_outline(shape, 0.0),)).draw(128))[None]


def _codes_of(shape: str) -> Tensor:
    return load_codebook().encode(_figure_mask(shape))


def _overlap_in_order(name: str) -> float:
    """Mask IoU of a shape with what its codes draw in another order, for one of ORDERS."""
    shape, order = name.split(maxsplit=1)
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    places = torch.arange(16).view(4, 4).T.flatten() if order == "by column" else shuffled
    drawn = load_codebook().decode(_codes_of(shape)[:, places])[0].numpy() > 0
    return mask_iou(_figure_mask(shape)[0].numpy() > 0.5, drawn)


def tokens_to_box(answer: Callable[[str, float, float], Any]) -> None:
    """Exercise 1."""
    width, height = 200.0, 120.0
    result = call(answer, "<loc0100><loc0250><loc0400><loc0900>", width, height)
    box = _numbers(result, 4, "four numbers, x0, y0, x1, y1")
    y0, x0, y1, x1 = (number / 1023 for number in (100, 250, 400, 900))
    reference = (x0 * width, y0 * height, x1 * width, y1 * height)

    def is_(*other: float) -> bool:
        return np.allclose(box, other, atol=1e-3)

    expect(
        not is_(y0 * width, x0 * height, y1 * width, x1 * height),
        "the words are read as x0 y0 x1 y1, but they are y0 x0 y1 x1: the box is mirrored about the diagonal",
    )
    expect(
        not is_(y0 * height, x0 * width, y1 * height, x1 * width),
        "the numbers are right and come as y0, x0, y1, x1: return x0, y0, x1, y1",
    )
    expect(
        not is_(x0 * height, y0 * width, x1 * height, y1 * width),
        "width and height are swapped: x is a share of the width, y of the height",
    )
    expect(
        not is_(*(edge * 1023 / 1024 for edge in reference)),
        "you divide by 1024, the number of words: the last of them is 1023 and means the edge of the picture",
    )
    expect(
        not is_(x0, y0, x1, y1),
        "these are shares of the picture from 0 to 1: multiply by its width and height for pixels",
    )
    expect(not is_(250, 100, 900, 400), "these are the numbers of the words: divide by 1023 for shares")
    expect(
        not any(is_(*whole(reference)) for whole in (np.rint, np.floor)),
        "your edges are whole numbers: a share of a picture can end between two pixels, so do not round",
    )
    expect(is_(*reference), f"the box is {_rounded(box)}, expected {_rounded(reference)}")
    whole = _numbers(call(answer, "<loc0000><loc0000><loc1023><loc1023> red star", 64, 48), 4, "four numbers")
    expect(
        np.allclose(whole, (0, 0, 64, 48)),
        "the words 0000, 0000, 1023, 1023 mean the whole picture, even with a name after them; yours is "
        f"{_rounded(whole)}",
    )
    right("y before x, and the last word is the far edge of the picture.")


def iou(answer: Callable[[Edges, Edges], Any]) -> None:
    """Exercise 2."""

    def of(a: Edges, b: Edges) -> float:
        return _numbers(call(answer, a, b), 1, "one number")[0]

    half = of((0, 0, 10, 20), (0, 5, 10, 25))
    expect(
        abs(half - 150 / 400) > 1e-6,
        "the overlap is counted twice in your union: subtract it once",
    )
    expect(
        abs(half - 150 / 200) > 1e-6,
        "you divide by the area of one box: divide by the union, the two areas minus the overlap",
    )
    expect(
        abs(half - (11 * 16) / (2 * 11 * 21 - 11 * 16)) > 1e-6,
        "each side came out one too long: edges lie between pixels, so a side is x1 - x0, without + 1",
    )
    expect(abs(half - 0.6) < 1e-6, f"the IoU of (0, 0, 10, 20) and (0, 5, 10, 25) is 0.6, not {half:.4f}")
    apart = of((0, 0, 10, 10), (20, 30, 40, 50))
    expect(
        apart <= 0,
        "two boxes that lie apart in both directions have an IoU above 0: the overlap is -10 across and "
        "-20 down, and the product of two negative numbers is positive. Clamp each at 0 first",
    )
    beside, below = of((0, 0, 10, 10), (12, 0, 22, 10)), of((0, 0, 10, 10), (0, 12, 10, 22))
    expect(
        apart == 0 and beside == 0 and below == 0,
        "boxes that lie apart have a negative IoU: clamp the overlap at 0, across and down",
    )
    inside = of((0, 0, 10, 10), (2, 3, 4, 8))
    expect(
        abs(inside - 0.1) < 1e-6,
        f"a box of area 10 inside a box of area 100 has IoU 0.1; yours is {inside:.4f}: take the larger of "
        "the two left edges and the smaller of the two right ones",
    )
    expect(
        abs(of((0, 0, 2, 4), (0, 0, 4, 2)) - 4 / 12) < 1e-6,
        "x and y are mixed up: edges 0 and 2 go from left to right, edges 1 and 3 from top to bottom",
    )
    try:
        empty = of((1, 1, 1, 1), (1, 1, 1, 1))
    except NotYet as error:
        if isinstance(error.__cause__, ZeroDivisionError):
            raise NotYet("two boxes without area lead to a division by zero: let their IoU be 0") from error
        raise
    expect(empty == 0, f"two boxes without area have IoU 0; yours is {empty}")
    right("the same as counting pixels, without the pixels.")


def precision_over_recalls(answer: Callable[[Sequence[bool], int], Any]) -> None:
    """Exercise 3."""

    def of(hits: Sequence[bool], wanted: int) -> float:
        return _numbers(call(answer, list(hits), wanted), 1, "one number")[0]

    # Wrong, right, right, wrong, of three wanted ones: precision 0, 1/2, 2/3, 1/2 at recall 0, 1/3, 2/3, 2/3.
    hits, wanted = [False, True, True, False], 3
    reference = solutions.precision_over_recalls(hits, wanted)
    result = of(hits, wanted)

    def is_(other: float) -> bool:
        return abs(result - other) < 1e-6

    expect(
        # With recall 0 read off at the second box, or at the first, where precision is 0.
        not is_((34 * 1 / 2 + 33 * 2 / 3) / 101) and not is_((33 * 1 / 2 + 33 * 2 / 3) / 101),
        "each recall got the precision where it is first reached: use the best precision at that recall or "
        "beyond, since more boxes can be more precise",
    )
    expect(
        not is_(2 / 3),
        "only 2 of the 3 wanted things were found, so no recall beyond 2/3 was reached: precision counts "
        "as 0 there. Is your recall a share of the wanted things, and your mean over all 101 recalls?",
    )
    expect(
        not is_(8 / 11 * 2 / 3) and not is_(7 / 11 * 2 / 3),
        "you read precision off at 11 recalls, as PASCAL VOC did: COCO uses 101, 0, 0.01, ..., 1",
    )
    expect(
        not is_(4 / 9),
        "this is the area under the curve of the best precision: COCO reads it off at 101 recalls instead, "
        "which is nearly, but not exactly the same",
    )
    expect(
        not is_(66 / 100 * 2 / 3) and not is_(67 / 100 * 2 / 3),
        "your mean is over 100 recalls: 0, 0.01, ..., 1 are 101 numbers, with both ends",
    )
    expect(
        not is_(66 / 101 * 2 / 3),
        "recall 0 is one of the 101 recalls, and it is always reached: count it",
    )
    expect(
        abs(of([True], 1) - 100 / 101) > 1e-6,
        "a recall that is reached exactly counts as reached: at or beyond, >=, and not >",
    )
    expect(
        not is_((34 * 1 / 2 + 33 * 2 / 3 + 34 * 1 / 2) / 101) and not is_((67 * 2 / 3 + 34 * 1 / 2) / 101),
        "recalls that are never reached got the last precision: they count 0, as nobody points at the rest",
    )
    expect(
        not is_((1 / 2 + 2 / 3) / 3) and not is_((0 + 1 / 2 + 2 / 3 + 1 / 2) / 4),
        "this is a mean over boxes: take the mean over the 101 recalls 0, 0.01, ..., 1",
    )
    expect(
        is_(reference),
        f"for wrong, right, right, wrong with 3 wanted it is {reference:.4f}, not {result:.4f}",
    )
    cases: list[tuple[list[bool], int, float]] = [
        ([True], 1, 1.0),
        ([False], 1, 0.0),
        ([], 2, 0.0),
        ([True], 2, 51 / 101),
        ([True, False, False], 1, 1.0),
        ([False, True], 1, 0.5),
    ]
    for given, number, value in cases:
        mine = of(given, number)
        expect(
            abs(mine - value) < 1e-6,
            f"for hits {given} and {number} wanted it is {value:.4f}; yours is {mine:.4f}",
        )
    right("the mean precision over 101 recalls, as COCO counts it.")


def paste_mask(answer: Callable[[np.ndarray, Edges, int, int], Any]) -> None:
    """Exercise 5."""
    down, across = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64), indexing="ij")
    # Leans to one side, so that swapped axes show; values from about -1 to 1, like a decoder's.
    values = (0.8 - np.abs(across - 0.4 * down) - 0.9 * np.abs(down + 0.3)).astype(np.float32)
    box, width, height = (10.7, 5.2, 60.9, 34.8), 90, 50
    reference = solutions.paste_mask(values, box, width, height)
    try:
        result = call(answer, values.copy(), box, width, height)
    except NotYet as error:
        if isinstance(error.__cause__, ValueError) and "broadcast" in str(error):
            raise NotYet(
                f"{error}. PIL's resize takes (width, height), an array is [height, width], and rows are y: "
                "mask[y0:y1, x0:x1]"
            ) from error
        raise
    expect(isinstance(result, np.ndarray), f"expected an array, got a {type(result).__name__}")
    expect(
        result.shape != (64, 64) and result.shape != (29, 50),
        f"this is the drawing alone, {list(result.shape)}: put it into a mask as large as the picture",
    )
    expect(
        result.shape != (width, height),
        "your mask is [width, height]: arrays are [height, width], rows first",
    )
    expect(result.shape == (height, width), f"the mask is {list(result.shape)}, expected [50, 90]")
    expect(
        result.dtype == np.bool_,
        f"the mask holds {result.dtype}: it should hold bools, True where the drawing is above 0",
    )

    def pasted(drawn: np.ndarray, x0: int = 10, y0: int = 5) -> np.ndarray:
        mask = np.zeros((height, width), dtype=bool)
        mask[y0 : y0 + drawn.shape[0], x0 : x0 + drawn.shape[1]] = drawn
        return mask

    def resized(array: np.ndarray, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((50, 29), how))

    expect(
        not np.array_equal(result, pasted(resized(values) > 0.5)),
        "your threshold is 0.5: the decoder gives about -1 outside and 1 inside, so the outline is at 0",
    )
    expect(
        not np.array_equal(result, pasted(resized((values > 0).astype(np.float32)) > 0))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.uint8) * 255) > 0))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.float32)) > 0.5))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.uint8) * 255) >= 128)),
        "you compare with 0 first and resize afterwards: resize the numbers first, so that the outline can "
        "fall between two of them",
    )
    expect(
        not np.array_equal(result, pasted(resized(values, Image.Resampling.NEAREST) > 0)),
        "resized to the nearest number, the outline is jagged: use Image.Resampling.BILINEAR",
    )
    upside = np.zeros((height, width), dtype=bool)
    upside[10:39, 5:55] = resized(values) > 0
    expect(
        not np.array_equal(result, upside),
        "the drawing is at (y, x) instead of (x, y): rows are y, mask[y0:y1, x0:x1]",
    )
    expect(
        not np.array_equal(result, pasted(resized(values) <= 0)),
        "inside and outside are swapped: the thing is where the drawing is above 0",
    )
    rounded = np.zeros((height, width), dtype=bool)
    rounded[5:35, 11:61] = np.asarray(Image.fromarray(values).resize((50, 30), Image.Resampling.BILINEAR)) > 0
    expect(
        not np.array_equal(result, rounded),
        "you rounded the edges to the nearest pixel: cut them with int(), so that 10.7 is 10 and 34.8 is 34. "
        "It is the convention of the published reader, and a mask that is moved by a pixel loses IoU",
    )
    expect(
        not np.array_equal(result, pasted(resized(np.ascontiguousarray(values.T)) > 0)),
        "the drawing is turned over its diagonal: rows of the array are rows of the picture",
    )
    outside = pasted(np.ones((29, 50), dtype=bool))
    expect(
        not (result & ~outside).any(),
        "your mask has pixels outside the box: truncate the edges to whole pixels with int(), so 10.7 is "
        "10 and 60.9 is 60, and leave the rest of the picture False",
    )
    differing = int((result != reference).sum())
    expect(differing == 0, f"{differing} of {reference.size} pixels are wrong")
    right("crop, resize, threshold: sixteen words have become pixels of the picture.")


def expected_drawings(
    answer: Callable[[], dict[str, str]], overlap_of: Callable[[str], float] = _overlap_in_order
) -> None:
    """Exercise 5: `overlap_of` measures the mask IoU of a drawing whose codes were read in another order."""
    expected = call(answer)
    names = ", ".join(repr(name) for name in ORDERS)
    expect(isinstance(expected, dict), f"return a dictionary with an entry for each of {names}")
    missing = [name for name in ORDERS if name not in expected]
    expect(not missing, f"a prediction is missing: {missing[:1]}")
    unknown = [name for name in expected if name not in ORDERS]
    expect(not unknown, f"{unknown[:1]} is none of the five drawings: {names}")
    vague = [value for value in expected.values() if value not in ("same", "broken")]
    expect(
        not vague,
        f"{vague[:1]} cannot be held against a number: say 'same' (an IoU of 0.9 or more) or 'broken'",
    )
    for name, (usual, why) in ORDERS.items():
        value = overlap_of(name)
        found = "same" if value >= 0.9 else "broken"
        expect(
            expected[name] == found,
            f"{name}: you expect {expected[name]!r}, but the drawing has an IoU of {value:.2f}. "
            + (f"The reason: {why}" if found == usual else "This codebook differs from the one we know"),
        )
    right("a test on circles and squares finds no fault here. Test with a figure that has no symmetry.")


def diagnose(answer: Callable[..., str]) -> None:
    """Exercise 6."""
    found = {fault: call(answer, _reader(fault), figure) for fault in FAULTS}
    expect(
        all(name in FAULTS for name in found.values()),
        f"return one of {FAULTS}; yours has {next((n for n in found.values() if n not in FAULTS), None)!r}",
    )
    expect(
        len(set(found.values())) > 1,
        f"every reader gets the diagnosis {found['none']!r}: compare what it returns with what is right",
    )
    hints = {
        (
            "x before y",
            "none",
        ): "a reader that exchanges x and y passes your test: take a box that is not square "
        "about the diagonal, in a picture that is wider than high",
        (
            "1024",
            "none",
        ): "a reader that divides by 1024 passes your test: the error is largest at the far edge, a "
        "thousandth of the side. Use the word 1023, and compare more closely",
        (
            "columns",
            "none",
        ): "a reader that takes the codes column by column passes your test: circle and square "
        "look the same that way. Use a figure without symmetry",
        (
            "threshold",
            "none",
        ): "a reader with another threshold passes your test: its masks are a little smaller, "
        "so compare every pixel and not only the overlap",
        ("columns", "threshold"): "codes by column are taken for a threshold: a higher threshold only takes "
        "pixels away, an exchange of codes also adds some",
        (
            "threshold",
            "columns",
        ): "a threshold is taken for an exchange of codes: a higher threshold only takes "
        "pixels away, an exchange of codes also adds some",
        (
            "x before y",
            "1024",
        ): "exchanged coordinates are taken for a wrong number of steps: dividing by 1024 "
        "shrinks all four edges by the same factor 1023 / 1024",
        (
            "1024",
            "x before y",
        ): "a wrong number of steps is taken for exchanged coordinates: dividing by 1024 "
        "shrinks all four edges by the same factor 1023 / 1024",
    }
    for fault, name in found.items():
        if name == fault:
            continue
        expect(
            fault != "none",
            f"a healthy reader gets the diagnosis {name!r}: its box is not rounded (use np.allclose), and "
            "its mask is that of paste_mask",
        )
        expect(
            fault not in ("x before y", "1024") or name not in ("columns", "threshold"),
            f"the fault {fault!r} is taken for {name!r}: a wrong box moves the mask as well, so look at the "
            "box first",
        )
        expect(
            (fault, name) in hints,
            f"the fault {fault!r} is taken for {name!r}, though the box is right: look at the mask",
        )
        raise NotYet(hints[fault, name])
    right("one triangle in an oblong picture tells all of them apart.")


def _numbers(result: Any, count: int, what: str) -> tuple[float, ...]:
    """The numbers in an answer as floats. Raises NotYet if there are others."""
    try:
        numbers = tuple(float(number) for number in (result if count > 1 else (result,)))
    except (TypeError, ValueError):
        raise NotYet(f"expected {what}, got a {type(result).__name__}: {result!r}") from None
    expect(len(numbers) == count, f"expected {what}, got {len(numbers)}")
    return numbers


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(number, 2) for number in numbers)
