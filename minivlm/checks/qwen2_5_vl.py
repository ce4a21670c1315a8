"""Checks for the exercises of 17_qwen2_5_vl."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checks import NotYet, call, expect, expect_faults, right
from minivlm.rope import apply_rotary
from minivlm.vision.qwen2_5_vl import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel, by_windows
from minivlm.vision.qwen2_vl import frames_of, grid_angles, grid_positions

FAULTS = ("not put back", "order again", "angles", "edges", "never full")
PATCH_VALUES = 3 * 2 * 14 * 14  # numbers in a patch: channels, frames, rows, columns

Box = tuple[float, float, float, float]


class solutions:
    """Reference solutions."""

    @staticmethod
    def doubled() -> dict[str, int]:
        """By what each number grows when both sides of a picture are doubled."""
        return {
            "patches": 4,
            "windows": 4,
            "patches in a window": 1,
            "pairs with windows": 4,
            "pairs with full attention": 16,
            "weights": 1,
        }

    @staticmethod
    def window_order(rows: int, columns: int, window: int) -> tuple[Tensor, list[int]]:
        """Cut the grid of numbers into bands, each band into windows, and write down one after the other."""
        grid = torch.arange(rows * columns).view(rows, columns)
        windows = [part.flatten() for band in grid.split(window) for part in band.split(window, dim=1)]
        return torch.cat(windows), [len(part) for part in windows]

    @staticmethod
    def diagnose(patient: Callable[..., Tensor], intact: Callable[..., Tensor]) -> str:
        """Whole windows first; then the two orders; then a patch that is changed far away."""

        def run(tower: Callable[..., Tensor], rows: int, columns: int, change: float = 0.0) -> Tensor:
            pixels = torch.randn(rows * columns, PATCH_VALUES, generator=torch.Generator().manual_seed(0))
            pixels[0] += change
            return tower(pixels, torch.tensor([[1, rows, columns]]))

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-3)

        theirs, good = run(patient, 16, 16), run(intact, 16, 16)
        order, _ = solutions.window_order(8, 8, 4)
        if close(theirs, good):
            return "edges"
        if close(theirs, good[order]):
            return "not put back"
        if close(theirs, good[order][order]):
            return "order again"
        if close(run(patient, 16, 16, change=5.0)[-1], theirs[-1]):
            return "never full"
        return "angles"

    @staticmethod
    def time_positions(steps: int, seconds_per_step: float, tokens_per_second: float) -> Tensor:
        """Rounded down at the very end, so that no error adds up."""
        return (torch.arange(steps) * (seconds_per_step * tokens_per_second)).long()

    @staticmethod
    def to_page(text: str, page: tuple[int, int], seen: tuple[int, int]) -> Box:
        """Each edge as a share of what the model saw, times the page's side, and no further than its edge."""
        x1, y1, x2, y2 = (float(number) for number in text.split())
        across, down = page[0] / seen[0], page[1] / seen[1]
        return (
            min(max(x1 * across, 0.0), page[0]),
            min(max(y1 * down, 0.0), page[1]),
            min(max(x2 * across, 0.0), page[0]),
            min(max(y2 * down, 0.0), page[1]),
        )


# ---- exercise: what grows ----------------------------------------------------------------------------------

_REASONS = {
    "patches": "there are twice as many across and twice as many down",
    "windows": "a window keeps its size in pixels, so there are more of them",
    "patches in a window": "a window has 112 x 112 pixels, and so 8 x 8 patches, in a picture of any size",
    "pairs with windows": "each of 4 times as many patches looks at the same 64",
    "pairs with full attention": "each of 4 times as many patches looks at 4 times as many",
    "weights": "no layer knows the picture's size: positions are computed, not learned",
}


def _measured(side: int) -> dict[str, int]:
    """The numbers of a square picture of so many patches on a side."""
    grid = torch.tensor([[1, side, side]])
    windows = [4 * tokens for tokens in by_windows(grid, 2, 4)[1]]
    return {
        "patches": side**2,
        "windows": len(windows),
        "patches in a window": max(windows),
        "pairs with windows": sum(patches**2 for patches in windows),
        "pairs with full attention": side**4,
        "weights": sum(weight.numel() for weight in small_tower().parameters()),
    }


def doubled(answer: Callable[..., Any]) -> None:
    """Every prediction against pictures of 448 and 896 pixels."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [name for name in _REASONS if name not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    before, after = _measured(32), _measured(64)
    wrong = []
    for name, reason in _REASONS.items():
        factor = after[name] / before[name]
        if result[name] != factor:
            wrong.append(f"{name}: you say {result[name]}, but the factor is {factor:g}, since {reason}")
    expect(not wrong, "\n".join(wrong))
    right("with windows a layer's pairs grow with the area, as the patches do, and not with its square.")


# ---- exercise: the window order ----------------------------------------------------------------------------


def _numbers(values: Any, what: str) -> list[int]:
    """A list or a tensor of whole numbers."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"{what} should be a list or a tensor of whole numbers, but it is {values!r}") from None
    expect(found.dim() == 1, f"{what} has {found.dim()} axes: give one row of numbers")
    expect(
        not found.is_floating_point(), f"{what} should hold whole numbers, but holds {found.dtype}: no index"
    )
    numbers: list[int] = found.tolist()
    return numbers


def _cells(rows: int, columns: int, window: int) -> list[list[Tensor]]:
    """The windows of a grid, band by band."""
    grid = torch.arange(rows * columns).view(rows, columns)
    return [list(band.split(window, dim=1)) for band in grid.split(window)]


def _joined(windows: Sequence[Tensor]) -> list[int]:
    return [number for window in windows for number in window.flatten().tolist()]


def _expect_order(found: list[int], rows: int, columns: int, window: int) -> None:
    """Raise NotYet with the likely mistake unless this is the order."""
    cells = _cells(rows, columns, window)
    windows = [part for band in cells for part in band]
    good, size = _joined(windows), f"for {rows} x {columns} tokens and windows of {window} x {window}"
    whole = [part for part in windows if part.numel() == window**2]
    expect(
        found != _joined(whole) or len(whole) == len(windows),
        f"{size} your order leaves out the smaller windows at the right and at the bottom: every token has "
        "to be in it",
    )
    expect(
        len(found) == rows * columns,
        f"{size} your order has {len(found)} numbers: expected one for each of the {rows * columns} tokens",
    )
    expect(
        sorted(found) == list(range(rows * columns)),
        f"{size} some tokens are in your order twice or not at all: it holds each number from 0 to "
        f"{rows * columns - 1} once. At the edges a window is smaller, not filled up",
    )
    first_small = torch.arange(rows * columns).view(rows, columns)
    sizes = [
        [length % window, *[window] * (length // window)]
        if length % window
        else [window] * (length // window)
        for length in (rows, columns)
    ]
    shifted = [part for band in first_small.split(sizes[0]) for part in band.split(sizes[1], dim=1)]
    chunks = [
        part
        for band in first_small.tensor_split(math.ceil(rows / window))
        for part in band.tensor_split(math.ceil(columns / window), dim=1)
    ]
    turned = [band[i] for i in range(len(cells[0])) for band in cells]
    mistakes = {
        "this is the row as it was, line by line: tokens of one window are not neighbors yet": list(
            range(rows * columns)
        ),
        "this is the inverse: number i should say which token comes i-th, not where token i "
        "goes": torch.tensor(good).argsort().tolist(),
        "the windows come column by column: go through the upper band of windows first, from left to "
        "right": _joined(turned),
        "inside of a window the tokens come column by column: read it line by line": _joined(
            [part.T for part in windows]
        ),
        "the smaller windows are at the left and at the top: begin with whole ones, what is left over comes "
        "last": _joined(shifted),
        "your windows are about equally large: make them whole first, and let the last one be "
        "smaller": _joined(chunks),
        "these are bands across the whole picture: cut each band into windows as well": _joined(
            [torch.cat(band, dim=1) for band in cells]
        ),
        "your windows are half as wide: the function gets the window's side in tokens, so there is no merge "
        "to take into account": _joined(
            [part for band in _cells(rows, columns, window // 2) for part in band]
        )
        if window > 1
        else [],
        "your windows are twice as wide: the function counts tokens, not patches": _joined(
            [part for band in _cells(rows, columns, 2 * window) for part in band]
        ),
        "the order is the right one read backwards": good[::-1],
    }
    for hint, wrong in mistakes.items():
        expect(found != wrong or wrong == good, f"{size} {hint}")
    first = (
        next(place for place, (a, b) in enumerate(zip(found, good, strict=True)) if a != b)
        if (found != good)
        else 0
    )
    expect(
        found == good,
        f"{size} place {first} should hold token {good[first]}, and yours has {found[first]}: draw the grid "
        "of numbers and cut it by hand",
    )


def _expect_lengths(found: list[int], rows: int, columns: int, window: int) -> None:
    cells = _cells(rows, columns, window)
    good = [part.numel() for band in cells for part in band]
    ends = torch.tensor(good).cumsum(0).tolist()
    size = f"for {rows} x {columns} tokens and windows of {window} x {window}"
    mistakes = {
        "you give where each window ends: give how many tokens it has": [ends, [0, *ends]],
        "you say that all windows are whole: those at the right and at the bottom have fewer tokens": [
            [window**2] * len(good)
        ],
        "there is a window without tokens: where the sides fit, nothing is left over": [
            [*good, 0],
            [length for band in cells for length in [*[part.numel() for part in band], 0]],
        ],
        "these are the lengths of whole bands: each band is cut into windows": [
            [sum(part.numel() for part in band) for band in cells]
        ],
        "you count patches: a token counts once here": [[4 * length for length in good]],
        "you give the side of each window: count its tokens": [[math.isqrt(length) for length in good]],
    }
    for hint, known in mistakes.items():
        expect(found not in known or found == good, f"the order is right, but not the lengths: {size} {hint}")
    expect(
        found == good,
        f"the order is right, but not the lengths: {size} they are {good}, and yours are {found}",
    )


def window_order(answer: Callable[..., Any]) -> None:
    """Ragged on both sides, on one, on none, and a window that is larger than the picture."""
    for rows, columns, window in (
        (6, 9, 4),
        (3, 5, 2),
        (6, 8, 4),
        (8, 8, 4),
        (5, 4, 2),
        (2, 3, 4),
        (11, 7, 3),
    ):
        result = call(answer, rows, columns, window)
        expect(
            isinstance(result, tuple | list) and len(result) == 2,
            "return two things: the order, and how many tokens each window has",
        )
        _expect_order(_numbers(result[0], "the order"), rows, columns, window)
        _expect_lengths(_numbers(result[1], "the list of lengths"), rows, columns, window)
    right("windows from left to right and from top to bottom, smaller ones last, and every token once.")


# ---- exercise: find the fault ------------------------------------------------------------------------------


def small_tower(std: float = 0.2, seed: int = 0) -> Qwen2_5_VLVisionModel:
    """Eight layers, of which the fourth and the last have full attention, with strong random weights."""
    config = Qwen2_5_VLVisionConfig(
        depth=8,
        hidden_size=64,
        out_hidden_size=32,
        intermediate_size=128,
        num_heads=4,
        fullatt_block_indexes=(3, 7),
    )
    with torch.random.fork_rng([]):
        tower = Qwen2_5_VLVisionModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in tower.named_parameters():
        weight.data = float("norm" in name) + std * torch.randn(weight.shape, generator=generator)
    return tower.requires_grad_(False)


class Patient(nn.Module):
    """A tower that is broken in one place."""

    def __init__(self, tower: Qwen2_5_VLVisionModel, fault: str) -> None:
        super().__init__()
        self.tower, self.fault = tower, fault

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """As the tower's, except for the fault."""
        tower, config, merge_size = self.tower, self.tower.config, self.tower.config.spatial_merge_size
        merged, head_dim = merge_size**2, config.hidden_size // config.num_heads
        order, tokens = by_windows(grid_thw, merge_size, config.window)
        if self.fault == "edges":  # cut as if all windows were whole
            tokens = [len(part) for part in order.split(config.window**2)]

        def moved(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, merged))[order].flatten(0, 1)

        x = moved(tower.embeddings(pixel_values))[None]
        cos, sin = grid_angles(grid_positions(grid_thw, merge_size), head_dim)
        if self.fault != "angles":
            cos, sin = moved(cos), moved(sin)
        rotary = partial(apply_rotary, cos=cos, sin=sin)
        full = () if self.fault == "never full" else config.fullatt_block_indexes
        windows = [merged * count for count in tokens]
        for number, layer in enumerate(tower.layers):
            x = layer(x, frames_of(grid_thw) if number in full else windows, rotary)
        merged_tokens: Tensor = tower.merger(x[0])
        if self.fault == "not put back":
            return merged_tokens
        return merged_tokens[order if self.fault == "order again" else order.argsort()]


def patients(tower: Qwen2_5_VLVisionModel) -> dict[str, Patient]:
    """The tower in five states, each broken in another place."""
    faults = ("never full", "order again", "edges", "angles", "not put back")
    return {letter: Patient(tower, fault) for letter, fault in zip("ABCDE", faults, strict=True)}


_SIGNS = {
    "edges": "a picture of whole windows, such as 16 x 16 patches, would be read as by the intact tower",
    "not put back": "each token of the intact tower would be there, and token i of yours would be its token "
    "order[i]",
    "order again": "each token of the intact tower would be there, and token i of yours would be its token "
    "order[order[i]]; in a picture of 32 x 32 patches it would not show at all",
    "never full": "a changed patch would change no token outside of its own window",
    "angles": "a picture of 16 x 16 patches would come out wrong, with tokens that the intact tower does not "
    "give at all, and a changed patch would still reach the last token",
}


@torch.no_grad()
def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults in a tower with weights of its own."""
    intact = small_tower(seed=1)
    said = {fault: call(answer, Patient(intact, fault), intact) for fault in FAULTS}
    expect_faults(said, _SIGNS, "tower", "towers")
    right("one picture of whole windows, its order, and one changed patch tell all five apart.")


# ---- exercise: seconds -------------------------------------------------------------------------------------


def time_positions(answer: Callable[..., Any]) -> None:
    """Steps of whole, half and odd numbers of positions; all exact in binary."""
    for steps, seconds, rate in ((5, 1.4375, 4), (5, 0.75, 2), (4, 0.25, 2), (4, 1.0, 2), (3, 2.0, 4)):
        result = call(answer, steps, seconds, rate)
        try:
            tensor = torch.as_tensor(result)
        except (TypeError, ValueError, RuntimeError):
            raise NotYet(f"give a list or a tensor of numbers, not {result!r}") from None
        case = f"for {steps} steps of {seconds:g} seconds at {rate} positions a second"
        expect(
            tensor.dim() == 1, f"{case} your result has {tensor.dim()} axes: give one position for each step"
        )
        expect(
            len(tensor) != 2 * steps,
            f"{case} you give a position for each frame: two frames make one step, which has one position",
        )
        expect(len(tensor) == steps, f"{case} you give {len(tensor)} positions: expected {steps}")
        found = tensor.double()
        number = torch.arange(steps).double()
        exact = number * seconds * rate
        good = exact.floor()
        mistakes = {
            "you number the steps, as Qwen2-VL does: a position has to say how much time has passed": number,
            "these are seconds: a second is tokens_per_second positions long": number * seconds,
            "these are whole seconds: multiply by tokens_per_second before you round": (
                number * seconds
            ).floor(),
            "the seconds were rounded before they were multiplied by tokens_per_second": (
                number * seconds
            ).floor()
            * rate,
            "you made the seconds of a step a whole number first: at four frames a second it is 0, and the "
            "whole clip stands at one moment": number * math.floor(seconds) * rate,
            "you rounded the length of a step, and the error adds up from step to step: multiply by the "
            "number of the step first, then round": number * math.floor(seconds * rate),
            "you rounded the length of a step to the nearest whole number, and the error adds up": number
            * round(seconds * rate),
            "you round to the nearest position: round down, as the original does": exact.round(),
            "you round to the nearest position: round down": (exact + 0.5).floor(),
            "you round up: a position is a whole number that has been reached": exact.ceil(),
            "the clip begins at position 0: you are one step ahead": ((number + 1) * seconds * rate).floor(),
            "you divide by tokens_per_second: the more positions a second has, the further apart steps are": (
                number * seconds / rate
            ).floor(),
            "the two frames of a step are counted twice: seconds_per_step holds both already": (
                2 * exact
            ).floor(),
            "you count positions of frames: seconds_per_step is from one step to the next": (
                exact / 2
            ).floor(),
        }
        for hint, wrong in mistakes.items():
            expect(not torch.equal(found, wrong) or torch.equal(wrong, good), f"{case} {hint}")
        expect(
            not (torch.equal(found, exact) and not torch.equal(exact, good)),
            f"{case} the positions are not whole numbers: round them down",
        )
        expect(
            torch.equal(found, good),
            f"{case} the positions are {good.long().tolist()}, and yours are {found.tolist()}: compute the "
            "second at which each step begins, and go on from there",
        )
    right("the second at which a step begins, in positions, rounded down once and at the end.")


# ---- exercise: a box on the page ---------------------------------------------------------------------------


def to_page(answer: Callable[..., Any]) -> None:
    """A page that was shrunk, one that was stretched a little, and a box that reaches beyond the edges."""
    cases = (
        ("100 200 300 280", (1240, 1754), (840, 1176)),
        ("31 196 154 274", (300, 400), (308, 392)),
        ("-3 10 845 1190", (1240, 1754), (840, 1176)),
    )
    for text, page, seen in cases:
        result = call(answer, text, page, seen)
        case = f'for "{text}" in a page of {page[0]} x {page[1]} seen at {seen[0]} x {seen[1]}'
        try:
            found = tuple(float(edge) for edge in result)
        except (TypeError, ValueError):
            raise NotYet(f"{case} you return {result!r}: return four numbers, x1, y1, x2, y2") from None
        expect(len(found) == 4, f"{case} you return {len(found)} numbers: return x1, y1, x2, y2")
        _expect_box(found, text, page, seen, case)
    right("each axis has its own factor, page over seen, and no box reaches beyond the page.")


def _expect_box(
    found: tuple[float, ...], text: str, page: tuple[int, int], seen: tuple[int, int], case: str
) -> None:
    read = [float(number) for number in text.split()]
    across, down = page[0] / seen[0], page[1] / seen[1]

    def scaled(*factors: float, box: Sequence[float] = read) -> Box:
        x1, y1, x2, y2 = (edge * factor for edge, factor in zip(box, factors, strict=True))
        return x1, y1, x2, y2

    def cut(box: Sequence[float], size: tuple[int, int] = page, least: float = 0.0) -> Box:
        x1, y1, x2, y2 = (min(max(edge, least), float(size[i % 2])) for i, edge in enumerate(box))
        return x1, y1, x2, y2

    good = solutions.to_page(text, page, seen)
    x1, y1, x2, y2 = good
    mistakes = {
        "you return the numbers as they are written: they are pixels of the picture that the model saw, not "
        "of the page": scaled(1, 1, 1, 1),
        "you scale the wrong way round: from what the model saw to the page it is page / seen": scaled(
            1 / across, 1 / down, 1 / across, 1 / down
        ),
        "y is scaled by the factor of x: the two sides are rounded to whole tokens each for itself": scaled(
            across, across, across, across
        ),
        "x is scaled by the factor of y: each axis has its own": scaled(down, down, down, down),
        "the two factors are exchanged: sizes are (width, height), and a box is x, y, x, y": scaled(
            down, across, down, across
        ),
        "you read thousandths, as Qwen2-VL writes them: here a number is a pixel": scaled(
            page[0] / 1000, page[1] / 1000, page[0] / 1000, page[1] / 1000
        ),
        "these are shares of the picture: multiply by the page's sides as well": scaled(
            1 / seen[0], 1 / seen[1], 1 / seen[0], 1 / seen[1]
        ),
        "only the upper left corner is scaled": scaled(across, down, 1, 1),
        "you return a corner with width and height: return the far corner": (x1, y1, x2 - x1, y2 - y1),
        "y comes first in your box: keep the order x1, y1, x2, y2": (y1, x1, y2, x2),
        "the box is cut off at the sides of what the model saw: scale first, then cut at the page": cut(
            scaled(across, down, across, down), seen
        ),
        "the box is cut off before it is scaled: scale first, then cut at the page": scaled(
            across, down, across, down, box=cut(read)
        ),
        "the box begins left of the page or above it: cut it off at 0 as well": cut(
            scaled(across, down, across, down), least=-math.inf
        ),
        "the box reaches beyond the page: cut it off at 0 and at the page's sides": scaled(
            across, down, across, down
        ),
    }

    def close(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(abs(one - other) < 1e-3 * max(1.0, abs(other)) for one, other in zip(a, b, strict=True))

    for hint, wrong in mistakes.items():
        for known in (wrong, cut(wrong)):
            expect(not close(found, known) or close(known, good), f"{case} {hint}")
    expect(
        max(abs(a - b) for a, b in zip(found, good, strict=True)) > 1 or close(found, good),
        f"{case} your edges are up to a pixel off: do not round them",
    )
    expect(
        close(found, good),
        f"{case} the box is {[round(edge, 1) for edge in good]}, and yours is "
        f"{[round(edge, 1) for edge in found]}: multiply x by page width / seen width, y by the heights",
    )
