"""The checks of 17_qwen2_5_vl accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, qwen2_5_vl
from minivlm.vision.qwen2_5_vl import by_windows

good = qwen2_5_vl.solutions


def ordered(change: Callable[[Tensor, int, int, int], Any]) -> Callable[..., Any]:
    """The right lengths, and an order that is made otherwise: of the grid of numbers."""

    def answer(rows: int, columns: int, window: int) -> Any:
        grid = torch.arange(rows * columns).view(rows, columns)
        return change(grid, rows, columns, window), good.window_order(rows, columns, window)[1]

    return answer


def lengths(change: Callable[[list[int], int, int, int], Any]) -> Callable[..., Any]:
    """The right order, and lengths that are made otherwise."""

    def answer(rows: int, columns: int, window: int) -> Any:
        order, sizes = good.window_order(rows, columns, window)
        return order, change(sizes, rows, columns, window)

    return answer


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def cells(grid: Tensor, down: Any, across: Any) -> list[Tensor]:
    return [part for band in grid.split(down) for part in band.split(across, dim=1)]


def column_by_column(grid: Tensor, rows: int, columns: int, window: int) -> Tensor:
    return joined([part for band in grid.split(window, dim=1) for part in band.split(window)])


def small_ones_first(grid: Tensor, rows: int, columns: int, window: int) -> Tensor:
    sides = [[s for s in (side % window, *[window] * (side // window)) if s] for side in (rows, columns)]
    return joined(cells(grid, *sides))


def equal_ones(grid: Tensor, rows: int, columns: int, window: int) -> Tensor:
    bands = grid.tensor_split(math.ceil(rows / window))
    return joined([p for band in bands for p in band.tensor_split(math.ceil(columns / window), dim=1)])


def whole_ones(rows: int, columns: int, window: int) -> Any:
    grid = torch.arange(rows * columns).view(rows, columns)
    whole = [part for part in cells(grid, window, window) if part.numel() == window**2]
    return (joined(whole) if whole else torch.tensor([], dtype=torch.long)), [window**2] * len(whole)


def filled_up(grid: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """Repeats the last row and column until windows are whole."""
    down = torch.arange(math.ceil(rows / window) * window).clamp(max=rows - 1)
    across = torch.arange(math.ceil(columns / window) * window).clamp(max=columns - 1)
    return joined(cells(grid[down][:, across], window, window))


def repeated(grid: Tensor, rows: int, columns: int, window: int) -> Tensor:
    order, _ = good.window_order(rows, columns, window)
    order[0] = order[1]
    return order


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced; a blank stands as _."""

    def answer(patient: Any, intact: Any) -> str:
        found = good.diagnose(patient, intact)
        return instead.get(found.replace(" ", "_"), found)

    return answer


def times(change: Callable[[Tensor, float, float], Any]) -> Callable[..., Any]:
    return lambda steps, seconds, rate: change(torch.arange(steps).double(), seconds, rate)


def box(change: Callable[[list[float], float, float, Any, Any], Any]) -> Callable[..., Any]:
    """Of the four numbers, the factors of x and y, and the two sizes."""

    def answer(text: str, page: Any, seen: Any) -> Any:
        read = [float(number) for number in text.split()]
        return change(read, page[0] / seen[0], page[1] / seen[1], page, seen)

    return answer


def by(*factors: float) -> Callable[[list[float]], list[float]]:
    return lambda read: [edge * factor for edge, factor in zip(read, factors * 2, strict=True)]


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "doubled": [
        ("^patches: you say 2, .* twice as many across", lambda: good.doubled() | {"patches": 2}),
        ("^windows: .* keeps its size", lambda: good.doubled() | {"windows": 1}),
        ("^windows: .* factor is 4", lambda: good.doubled() | {"windows": 2}),
        ("in a window: .* 8 x 8 patches", lambda: good.doubled() | {"patches in a window": 4}),
        ("with windows: .* the same 64", lambda: good.doubled() | {"pairs with windows": 16}),
        ("with windows: you say 1", lambda: good.doubled() | {"pairs with windows": 1}),
        (
            "with full attention: .* 4 times as many$",
            lambda: good.doubled() | {"pairs with full attention": 4},
        ),
        ("with full attention: you say 8", lambda: good.doubled() | {"pairs with full attention": 8}),
        ("weights: .* computed, not learned", lambda: good.doubled() | {"weights": 4}),
        ("no prediction yet for: patches, windows", lambda: {"weights": 1}),
        ("return the dict", lambda: list(good.doubled().values())),
    ],
    "window_order": [
        ("line by line: tokens", ordered(lambda grid, *_: grid.flatten())),
        ("this is the inverse", ordered(lambda grid, *sizes: good.window_order(*sizes)[0].argsort())),
        ("windows come column by column", ordered(column_by_column)),
        ("tokens come column by column", ordered(lambda g, r, c, w: joined([p.T for p in cells(g, w, w)]))),
        ("at the left and at the top", ordered(small_ones_first)),
        ("about equally large", ordered(equal_ones)),
        ("leaves out the smaller windows", whole_ones),
        ("expected one for each of the 54 tokens", ordered(filled_up)),
        ("twice or not at all", ordered(repeated)),
        ("half as wide", ordered(lambda g, r, c, w: joined(cells(g, max(w // 2, 1), max(w // 2, 1))))),
        ("twice as wide", ordered(lambda g, r, c, w: joined(cells(g, 2 * w, 2 * w)))),
        ("read backwards", ordered(lambda g, r, c, w: good.window_order(r, c, w)[0].flip(0))),
        ("place 0 should hold token 0", ordered(lambda g, r, c, w: good.window_order(r, c, w)[0].roll(1))),
        ("return two things", lambda *sizes: good.window_order(*sizes)[0]),
        ("no index", ordered(lambda g, r, c, w: good.window_order(r, c, w)[0].float())),
        ("has 2 axes", ordered(lambda grid, *_: grid)),
        ("the order should be a list or a tensor", ordered(lambda *_: "0, 1, 2")),
        ("where each window ends", lengths(lambda sizes, *_: torch.tensor(sizes).cumsum(0))),
        ("where each window ends", lengths(lambda sizes, *_: [0, *torch.tensor(sizes).cumsum(0).tolist()])),
        ("all windows are whole", lengths(lambda sizes, r, c, w: [w * w] * len(sizes))),
        ("a window without tokens", lengths(lambda s, r, c, w: s if r % w or c % w else [*s, 0])),
        ("you count patches", lengths(lambda sizes, *_: [4 * size for size in sizes])),
        ("give the side of each window", lengths(lambda sizes, *_: [math.isqrt(size) for size in sizes])),
        (
            "lengths of whole bands",
            lengths(lambda s, r, c, w: [c * min(w, r - top) for top in range(0, r, w)]),
        ),
        ("they are .* and yours are", lengths(lambda sizes, *_: sizes[::-1])),
        ("your code stops", lambda rows, columns, window: torch.arange(rows * columns).view(window, -1)),
    ],
    "diagnose": [
        ("for all five", lambda patient, intact: "angles"),
        ("for all five .* whole windows", lambda patient, intact: "edges"),
        ("one of the five names", lambda patient, intact: "windows"),
        ("returns nothing", lambda patient, intact: None),
        ("With 'edges', a picture of whole windows", diagnosed(angles="edges")),
        ("With 'edges', a picture of whole windows", diagnosed(never_full="edges")),
        (r"With 'not put back', .* order\[i\]", diagnosed(order_again="not put back")),
        (r"With 'order again', .* order\[order\[i\]\]", diagnosed(not_put_back="order again")),
        ("With 'never full', a changed patch", diagnosed(angles="never full")),
        ("With 'never full', a changed patch", diagnosed(edges="never full")),
        ("With 'angles', .* still reach", diagnosed(never_full="angles")),
        ("With 'angles', .* would come out wrong", diagnosed(edges="angles")),
        ("With 'not put back'", diagnosed(angles="not put back")),
    ],
    "time_positions": [
        ("number the steps", times(lambda i, s, r: i.long())),
        ("these are seconds", times(lambda i, s, r: i * s)),
        ("these are whole seconds", times(lambda i, s, r: (i * s).long())),
        ("rounded before they were multiplied", times(lambda i, s, r: (i * s).long() * r)),
        ("stands at one moment", times(lambda i, s, r: i * int(s) * r)),
        ("adds up from step to step", times(lambda i, s, r: i * int(s * r))),
        ("nearest whole number, and the error adds up", times(lambda i, s, r: i * round(s * r))),
        ("round to the nearest position", times(lambda i, s, r: (i * s * r).round())),
        ("round to the nearest position", times(lambda i, s, r: (i * s * r + 0.5).floor())),
        ("you round up", times(lambda i, s, r: (i * s * r).ceil())),
        ("one step ahead", times(lambda i, s, r: ((i + 1) * s * r).floor())),
        ("you divide by tokens_per_second", times(lambda i, s, r: (i * s / r).floor())),
        ("counted twice", times(lambda i, s, r: (2 * i * s * r).floor())),
        ("positions of frames", times(lambda i, s, r: (i * s * r / 2).floor())),
        ("not whole numbers", times(lambda i, s, r: i * s * r)),
        ("a position for each frame", times(lambda i, s, r: torch.arange(2 * len(i)) * s * r)),
        ("you give 4 positions: expected 5", times(lambda i, s, r: i[:-1] * s * r)),
        ("has 2 axes", times(lambda i, s, r: (i * s * r)[None])),
        ("a list or a tensor of numbers", times(lambda i, s, r: "0 2 4 6")),
        ("the second at which each step begins", times(lambda i, s, r: (i * s * r).floor() + 10)),
    ],
    "to_page": [
        ("pixels of the picture that the model saw", box(lambda n, *_: n)),
        ("the wrong way round", box(lambda n, x, y, *_: by(1 / x, 1 / y)(n))),
        ("y is scaled by the factor of x", box(lambda n, x, y, *_: by(x, x)(n))),
        ("x is scaled by the factor of y", box(lambda n, x, y, *_: by(y, y)(n))),
        ("two factors are exchanged", box(lambda n, x, y, *_: by(y, x)(n))),
        ("you read thousandths", box(lambda n, x, y, page, _: by(page[0] / 1000, page[1] / 1000)(n))),
        ("shares of the picture", box(lambda n, x, y, _, seen: by(1 / seen[0], 1 / seen[1])(n))),
        ("only the upper left corner", box(lambda n, x, y, *_: [n[0] * x, n[1] * y, n[2], n[3]])),
        (
            "corner with width and height",
            box(lambda n, x, y, *_: [n[0] * x, n[1] * y, (n[2] - n[0]) * x, (n[3] - n[1]) * y]),
        ),
        ("y comes first", box(lambda n, x, y, *_: [n[1] * y, n[0] * x, n[3] * y, n[2] * x])),
        ("reaches beyond the page", box(lambda n, x, y, *_: by(x, y)(n))),
        (
            "at 0 as well",
            box(lambda n, x, y, page, _: [min(e, page[i % 2]) for i, e in enumerate(by(x, y)(n))]),
        ),
        (
            "cut off before it is scaled",
            box(lambda n, x, y, page, _: by(x, y)([min(max(e, 0), page[i % 2]) for i, e in enumerate(n)])),
        ),
        ("do not round them", box(lambda n, x, y, *_: [int(edge) for edge in by(x, y)(n)])),
        ("return four numbers", box(lambda n, *_: 3)),
        ("you return 2 numbers", box(lambda n, x, y, *_: by(x, y)(n)[:2])),
        ("multiply x by page width", box(lambda n, x, y, *_: [2 * edge for edge in by(x, y)(n)])),
        ("your code stops", lambda text, page, seen: [number * 2 for number in text] / 2),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{number}" for name, wrong in WRONG.items() for number in range(len(wrong))],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(qwen2_5_vl, name)(answer)


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def by_numpy(rows: int, columns: int, window: int) -> tuple[list[int], np.ndarray]:
    """As transformers does it: fill up with -100, cut, and leave the -100 out."""
    padded = np.full((math.ceil(rows / window) * window, math.ceil(columns / window) * window), -100)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    down, across = (side // window for side in padded.shape)
    windows = padded.reshape(down, window, across, window).transpose(0, 2, 1, 3).reshape(-1, window * window)
    return windows[windows >= 0].tolist(), (windows >= 0).sum(axis=1)


def by_sorting(rows: int, columns: int, window: int) -> tuple[Tensor, list[int]]:
    """A stable sort by the number of each token's window."""
    down, across = torch.arange(rows) // window, torch.arange(columns) // window
    number = (down[:, None] * (int(across[-1]) + 1) + across).flatten()
    return number.sort(stable=True).indices, number.bincount().tolist()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("window_order", by_numpy),
        ("window_order", by_sorting),
        ("window_order", lambda r, c, w: by_windows(torch.tensor([[1, 2 * r, 2 * c]]), 2, w)),
        ("time_positions", lambda steps, s, r: [int(i * s * r) for i in range(steps)]),
        ("time_positions", times(lambda i, s, r: (i * s * r).floor())),
        (
            "to_page",
            box(lambda n, x, y, page, _: [min(max(e, 0), page[i % 2]) for i, e in enumerate(by(x, y)(n))]),
        ),
        ("doubled", lambda: {name: float(factor) for name, factor in good.doubled().items()}),
    ],
)
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(qwen2_5_vl, name)(answer)


@torch.no_grad()
def test_the_patients_have_the_five_faults() -> None:
    tower = qwen2_5_vl.small_tower()
    found = [good.diagnose(patient, tower) for patient in qwen2_5_vl.patients(tower).values()]
    assert sorted(found) == sorted(qwen2_5_vl.FAULTS)


@torch.no_grad()
def test_a_patient_without_a_fault_is_the_tower() -> None:
    """So what is measured on a patient is its fault, and nothing else."""
    tower, grid = qwen2_5_vl.small_tower(), torch.tensor([[1, 10, 12], [2, 4, 6]])
    pixels = torch.randn(168, qwen2_5_vl.PATCH_VALUES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(qwen2_5_vl.Patient(tower, "none")(pixels, grid), tower(pixels, grid))
