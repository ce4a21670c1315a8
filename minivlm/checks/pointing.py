"""Checks of 08_boxes_and_masks: reading boxes, overlap, average precision, nearest codes, pasting a mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same

Edges = Sequence[float]  # x0, y0, x1, y1


class solutions:
    """The answers that the notebook goes on with."""

    @staticmethod
    def tokens_to_box(text: str, width: float, height: float) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in pixels from "<locYYYY><locXXXX><locYYYY><locXXXX>"."""
        y0, x0, y1, x1 = (int(digits) / 1023 for digits in re.findall(r"<loc(\d{4})>", text))
        return x0 * width, y0 * height, x1 * width, y1 * height

    @staticmethod
    def iou(a: Edges, b: Edges) -> float:
        """Area of both boxes x0, y0, x1, y1 over the area of either; 0 where there is no area."""
        across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = across * down
        either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
        return both / either if either > 0 else 0.0

    @staticmethod
    def precision_over_recalls(hits: Sequence[bool], wanted: int) -> float:
        """Mean of the best precision at or beyond each recall 0, 0.01, ..., 1; hits come surest first."""
        right = np.cumsum(hits)
        recall = right / wanted
        precision = right / np.arange(1, len(hits) + 1)
        reached = [precision[recall >= least].max(initial=0.0) for least in np.linspace(0, 1, 101)]
        return float(np.mean(reached))

    @staticmethod
    def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
        """Numbers [...] of the rows of codes [K, D] that are nearest to vectors [..., D]."""
        return (vectors[..., None, :] - codes).square().sum(dim=-1).argmin(dim=-1)

    @staticmethod
    def paste_mask(values: np.ndarray, box: Edges, width: int, height: int) -> np.ndarray:
        """Bools [height, width]: the drawing [64, 64] resized to the box's whole pixels, inside where > 0."""
        x0, y0, x1, y1 = (int(edge) for edge in box)
        drawn = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        mask = np.zeros((height, width), dtype=bool)
        mask[y0:y1, x0:x1] = np.asarray(drawn) > 0
        return mask


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
        "the words are read as x0 y0 x1 y1, but they are y0 x0 y1 x1: the box is mirrored on the diagonal",
    )
    expect(
        not is_(y0 * height, x0 * width, y1 * height, x1 * width),
        "the numbers are right and come as y0, x0, y1, x1: return x0, y0, x1, y1",
    )
    expect(
        not is_(x0 * height, y0 * width, x1 * height, y1 * width),
        "width and height are exchanged: x is a share of the width, y of the height",
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
    expect(is_(*reference), f"the box is {_rounded(box)}, expected {_rounded(reference)}")
    whole = _numbers(call(answer, "<loc0000><loc0000><loc1023><loc1023> red star", 64, 48), 4, "four numbers")
    expect(
        np.allclose(whole, (0, 0, 64, 48)),
        f"the words 0000, 0000, 1023, 1023 are the whole picture, also with a name behind them, yours is "
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
        "the area of both boxes is counted twice in your union: subtract the overlap once",
    )
    expect(
        abs(half - 150 / 200) > 1e-6,
        "you divide by the area of one box: divide by the union, the two areas less the overlap",
    )
    expect(
        abs(half - (11 * 16) / (2 * 11 * 21 - 11 * 16)) > 1e-6,
        "each side came out one too long: edges are places between pixels, so a side is x1 - x0, without + 1",
    )
    expect(abs(half - 0.6) < 1e-6, f"of (0, 0, 10, 20) and (0, 5, 10, 25) the IoU is 0.6, not {half:.4f}")
    apart = of((0, 0, 10, 10), (20, 30, 40, 50))
    expect(
        apart <= 0,
        "two boxes that lie apart both ways have an IoU above 0: the overlap is -10 across and -20 down, and "
        "the product of two negative numbers is positive. Cut each at 0 first",
    )
    beside, below = of((0, 0, 10, 10), (12, 0, 22, 10)), of((0, 0, 10, 10), (0, 12, 10, 22))
    expect(
        apart == 0 and beside == 0 and below == 0,
        "boxes that lie apart have a negative IoU: cut the overlap at 0, across and down",
    )
    inside = of((0, 0, 10, 10), (2, 3, 4, 8))
    expect(
        abs(inside - 0.1) < 1e-6,
        f"a box of area 10 inside a box of area 100 has IoU 0.1, yours is {inside:.4f}: take the larger of "
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
            raise NotYet("two boxes without area divide by zero: let their IoU be 0") from error
        raise
    expect(empty == 0, f"two boxes without area have IoU 0, yours is {empty}")
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
        not is_((34 * 1 / 2 + 33 * 2 / 3) / 101),
        "each recall got the precision where it is first reached: it counts with the best precision at it or "
        "beyond it, since more boxes can be more precise",
    )
    expect(
        not is_(2 / 3),
        "only 2 of the 3 wanted things were found, so no recall beyond 2/3 was reached: there precision "
        "counts 0. Is your recall a share of the wanted things, and your mean over all 101 recalls?",
    )
    expect(
        not is_(8 / 11 * 2 / 3) and not is_(7 / 11 * 2 / 3),
        "you read precision off at 11 recalls, as PASCAL VOC did: COCO takes 101, 0, 0.01, ..., 1",
    )
    expect(
        not is_(4 / 9),
        "this is the area under the curve of the best precision: COCO reads it off at 101 recalls instead, "
        "which is nearly, but not exactly the same",
    )
    expect(
        not is_(66 / 101 * 2 / 3),
        "recall 0 is one of the 101 recalls, and it is reached as well: count it",
    )
    expect(
        is_(reference), f"for wrong, right, right, wrong of 3 wanted it is {reference:.4f}, not {result:.4f}"
    )
    cases: list[tuple[list[bool], int, float]] = [
        ([True], 1, 1.0),
        ([False], 1, 0.0),
        ([], 2, 0.0),
        ([True], 2, 51 / 101),
        ([True, False, False], 1, 1.0),
        ([False, True], 1, 0.5),
    ]
    for ranked, number, value in cases:
        mine = of(ranked, number)
        expect(
            abs(mine - value) < 1e-6,
            f"for hits {ranked} and {number} wanted it is {value:.4f}, yours is {mine:.4f}",
        )
    right("the mean precision over 101 recalls, as COCO counts it.")


def nearest_codes(answer: Callable[[Tensor, Tensor], Any]) -> None:
    """Exercise 4."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(12, 5, generator=generator) * torch.linspace(0.3, 3.0, 12)[:, None]
    vectors = 2.0 * torch.randn(3, 4, 5, generator=generator)
    reference = solutions.nearest_codes(vectors, codes)
    result = call(answer, vectors.clone(), codes.clone())
    expect(isinstance(result, Tensor), f"expected a tensor of numbers, got a {type(result).__name__}")
    expect(
        tuple(result.shape) != (3, 4, 5),
        "these are vectors: return the numbers of the codes, and the decoder will look them up",
    )
    expect(
        tuple(result.shape) != (12,) and tuple(result.shape) != (3, 12),
        "for each code you looked for the nearest vector: it is the other way around, take the smallest "
        "distance over the codes",
    )
    expect(
        tuple(result.shape) == (3, 4),
        f"the numbers have shape {list(result.shape)}, expected [3, 4]: one for each vector",
    )
    far = (vectors[..., None, :] - codes).square().sum(-1).argmax(-1)
    dot = (vectors @ codes.T).argmax(-1)
    cosine = (vectors @ torch.nn.functional.normalize(codes, dim=-1).T).argmax(-1)
    expect(not same(result, far), "these are the codes that are farthest away: argmin, not argmax")
    expect(
        not same(result, dot),
        "the largest product is not the smallest distance: long codes win too often. "
        "|v - e|^2 = |v|^2 - 2 v e + |e|^2, and |e|^2 differs from code to code",
    )
    expect(
        not same(result, cosine),
        "this is the code in the nearest direction: its length counts as well, so measure the distance",
    )
    expect(
        not same(result, (vectors[..., None, :] - codes).abs().sum(-1).argmin(-1)),
        "you add up absolute differences: the distance is the root of the sum of their squares",
    )
    expect_tensor(result, reference, "the numbers of the codes")
    one = call(answer, vectors[0, 0], codes)
    expect(
        isinstance(one, Tensor) and int(one) == int(reference[0, 0]),
        "a single vector [D] gives another code than in a batch: work on the last axis only",
    )
    right("each vector has become a number from 0 to 127, that is, a word.")


def paste_mask(answer: Callable[[np.ndarray, Edges, int, int], Any]) -> None:
    """Exercise 5."""
    down, across = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64), indexing="ij")
    # Leans to one side, so that exchanged axes show; values from about -1 to 1, as a decoder gives them.
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
        f"the mask holds {result.dtype}: it is a mask of bools, inside where the drawing is above 0",
    )

    def pasted(drawn: np.ndarray, x0: int = 10, y0: int = 5) -> np.ndarray:
        mask = np.zeros((height, width), dtype=bool)
        mask[y0 : y0 + drawn.shape[0], x0 : x0 + drawn.shape[1]] = drawn
        return mask

    def resized(array: np.ndarray, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((50, 29), how))

    expect(
        not np.array_equal(result, pasted(resized(values) > 0.5)),
        "the threshold is 0.5: the decoder gives about -1 outside and 1 inside, so the outline is at 0",
    )
    expect(
        not np.array_equal(result, pasted(resized((values > 0).astype(np.float32)) > 0))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.uint8) * 255) > 0))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.float32)) > 0.5))
        and not np.array_equal(result, pasted(resized((values > 0).astype(np.uint8) * 255) >= 128)),
        "you compare with 0 first and resize then: resize the numbers, so that the outline can fall between "
        "two of them",
    )
    expect(
        not np.array_equal(result, pasted(resized(values, Image.Resampling.NEAREST) > 0)),
        "resized to the nearest number, the outline has steps: use Image.Resampling.BILINEAR",
    )
    upside = np.zeros((height, width), dtype=bool)
    upside[10:39, 5:55] = resized(values) > 0
    expect(
        not np.array_equal(result, upside),
        "the drawing stands at (y, x) instead of (x, y): rows are y, mask[y0:y1, x0:x1]",
    )
    expect(
        not np.array_equal(result, pasted(resized(values) <= 0)),
        "inside and outside are exchanged: the thing is where the drawing is above 0",
    )
    outside = pasted(np.ones((29, 50), dtype=bool))
    expect(
        not (result & ~outside).any(),
        "pixels outside of the box are inside of your mask: cut the edges to whole pixels by int(), "
        "10.7 is 10 and 60.9 is 60, and leave the rest of the picture False",
    )
    differing = int((result != reference).sum())
    expect(differing == 0, f"{differing} pixels of {reference.size} are not as they should be")
    right("crop, resize, threshold: sixteen words have become pixels of the picture.")


def _numbers(result: Any, count: int, what: str) -> tuple[float, ...]:
    """What an answer holds as floats, or NotYet."""
    try:
        numbers = tuple(float(number) for number in (result if count > 1 else (result,)))
    except (TypeError, ValueError):
        raise NotYet(f"expected {what}, got a {type(result).__name__}: {result!r}") from None
    expect(len(numbers) == count, f"expected {what}, got {len(numbers)}")
    return numbers


def _rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(number, 2) for number in numbers)
