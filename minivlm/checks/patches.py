"""Checks for 01_patches: counting patches, putting them back, a class token, positions for another size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same


class solutions:
    """The exercises' functions as the rest of the notebook uses them."""

    @staticmethod
    def patch_count(height: int, width: int, patch_size: int) -> int:
        """How many whole patches a picture gives."""
        return (height // patch_size) * (width // patch_size)

    @staticmethod
    def unpatchify(patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches [B, rows * columns, 3 * P * P] -> pictures [B, 3, rows * P, columns * P]."""
        P = round((patches.shape[2] / 3) ** 0.5)
        x = patches.reshape(-1, rows, columns, 3, P, P)
        x = x.permute(0, 3, 1, 4, 2, 5)  # [B, 3, rows, P, columns, P]
        return x.reshape(-1, 3, rows * P, columns * P)

    @staticmethod
    def add_class_token(patches: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
        """patches [B, N, D], class_token [1, 1, D], positions [N + 1, D] -> [B, N + 1, D]."""
        first = class_token.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + positions

    @staticmethod
    def resize_positions(table: Tensor, new_side: int) -> Tensor:
        """Position vectors [side * side, D] of one grid -> [new_side * new_side, D] of another."""
        side = round(len(table) ** 0.5)
        grid = table.T.reshape(1, -1, side, side)  # [1, D, side, side]
        grid = F.interpolate(grid, size=(new_side, new_side), mode="bilinear")
        return grid[0].flatten(1).T


def patch_count(answer: Callable[..., Any]) -> None:
    """Sizes that patches divide evenly and sizes that they do not, square and not square."""
    for height, width, patch in ((224, 224, 16), (384, 384, 14), (250, 100, 16), (100, 250, 16)):
        result = call(answer, height, width, patch)
        truth = solutions.patch_count(height, width, patch)
        rows, columns = height // patch, width // patch
        case = f"for {height} x {width} pixels and patches of {patch} x {patch}"
        mistakes = {
            rows: f"{case} you counted one row of patches: multiply the rows by the columns",
            columns: f"{case} you counted one row of patches: multiply the rows by the columns",
            -(-height // patch) * -(-width // patch): f"{case} you counted the pieces at the right and "
            'lower edge as whole patches. padding="valid" drops them: round down',
            height * width // patch**2: f"{case} you divided the areas, which turns the leftovers "
            "at both edges into patches: divide each side separately, and round down each time",
            round(height / patch) * round(width / patch): f"{case} you rounded to the nearest number: an "
            "incomplete patch is never counted, so round down",
            rows * rows: f"{case} you used the height twice: pictures need not be square",
            columns * columns: f"{case} you used the width twice: pictures need not be square",
            truth + 1: f"{case} you counted one token too many: SigLIP has no class token",
        }
        expect(isinstance(result, int | float), f"{case} you return a {type(result).__name__}, not a number")
        if result != truth:
            hint = f"{case} there are {truth} patches, and your function returns {result}"
            raise NotYet(mistakes.get(result, hint))
        expect(
            isinstance(result, int),
            f"the number is right, but it is a {type(result).__name__}, which cannot be a size: use //, "
            "which rounds down as well",
        )
    right("196 tokens for 224 / 16, 729 for 384 / 14, and pictures that are not square work as well.")


def unpatchify(answer: Callable[..., Any]) -> None:
    """Pictures that are not square come back from their patches."""
    rows, columns, P = 3, 5, 4
    pictures = _noise(2, 3, rows * P, columns * P)
    grid = pictures.reshape(2, 3, rows, P, columns, P).permute(0, 2, 4, 1, 3, 5)
    patches = grid.flatten(3).flatten(1, 2)  # [2, 15, 48]
    result = call(answer, patches, rows, columns)
    pixels_first = patches.reshape(2, rows, columns, P, P, 3).permute(0, 5, 1, 3, 2, 4)
    mistakes = {
        "the numbers fill the new shape in memory order, one row of pixels after another, but a patch "
        "holds pieces of several rows: a permute is missing between two reshapes": (
            patches.reshape(2, 3, rows * P, columns * P)
        ),
        "the patches are placed column by column: patch number 1 belongs to the right of patch 0, so rows "
        "come before columns when you split N": (
            patches.reshape(2, columns, rows, 3, P, P).permute(0, 3, 2, 4, 1, 5).reshape(pictures.shape)
        ),
        "each patch is in its place, but flipped across its diagonal: inside a patch the row comes before "
        "the column, in the permute too": grid.permute(0, 3, 1, 5, 2, 4).reshape(pictures.shape),
        "the patches are in place, but their pixels are not: a patch holds all of its red numbers first, "
        "so split it into (3, P, P), not (P, P, 3)": pixels_first.reshape(pictures.shape),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (2, rows * P, columns * P, 3),
            "the channels are last, as matplotlib wants them; PyTorch's pictures are [B, 3, height, width]",
        )
        expect(
            tuple(result.shape) != (2, 3, columns * P, rows * P),
            "height and width are swapped: the height is rows * P",
        )
    expect_tensor(result, pictures, "the picture")
    right("the pictures come back exactly, so cutting into patches loses nothing.")


def add_class_token(answer: Callable[..., Any]) -> None:
    """The class token comes first, gets position 0, and is the same for every picture."""
    patches, token, positions = _noise(2, 6, 8), _noise(1, 1, 8) + 3, _noise(7, 8) - 3
    try:
        result = call(answer, patches, token, positions)
    except NotYet as error:
        if "Sizes of tensors must match" in str(error) or "Tensors must have same number" in str(error):
            raise NotYet(
                "torch.cat needs the same batch size on both sides: give every picture its own copy of the "
                "class token first, with class_token.expand(B, -1, -1)"
            ) from error
        if "must match the size of tensor" in str(error):
            raise NotYet(
                "there are N + 1 positions, including one for the class token: put the class token in "
                "front of the patches first, then add the positions to all of them"
            ) from error
        raise
    tokens = token.expand(2, -1, -1)
    mistakes = {
        "the class token is last: it comes first and has position 0": (
            torch.cat([patches, tokens], dim=1) + positions
        ),
        "the class token is last, with position 0: it comes first": (
            torch.cat([patches + positions[1:], tokens + positions[0]], dim=1)
        ),
        "the class token has no position: add `positions` after torch.cat, to all N + 1 tokens": (
            torch.cat([tokens, patches + positions[1:]], dim=1)
        ),
        "the patches have the first N positions, and the last one is left over: the class token has position "
        "0, so the first patch has position 1": (torch.cat([tokens, patches + positions[:-1]], dim=1)),
        "no positions were added": torch.cat([tokens, patches], dim=1),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != tuple(patches.shape),
            "the result has as many tokens as there are patches: the class token is one more",
        )
    expect_tensor(result, solutions.add_class_token(patches, token, positions), "the sequence")
    right("N + 1 tokens, the class token first, each with its own position.")


def resize_positions(answer: Callable[..., Any]) -> None:
    """The table is resized as a grid, along both sides, not along the sequence."""
    table = _noise(16, 6)
    grid = table.T.reshape(1, 6, 4, 4)

    def resized(grid: Tensor, side: int, mode: str, corners: bool | None = None) -> Tensor:
        return F.interpolate(grid, size=(side, side), mode=mode, align_corners=corners)[0].flatten(1).T

    for side in (7, 2):
        result = call(answer, table, side)
        truth = solutions.resize_positions(table, side)
        line = F.interpolate(table.T[None], size=side * side, mode="linear")[0].T
        mistakes = {
            "you stretched the table along the sequence: then a patch at the end of a row is mixed with the "
            "start of the next row. Make it a grid [1, D, side, side] first": line,
            "the table was reshaped to [1, D, side, side] without a transpose: D is its last axis, so the "
            "numbers of a vector were laid out as neighbors in space": resized(
                table.reshape(1, 6, 4, 4), side, "bilinear"
            ),
            "rows and columns are swapped: positions are counted row by row": (
                resized(grid.mT, side, "bilinear")
            ),
            'this is mode="nearest", F.interpolate\'s default, which copies vectors: use mode="bilinear"': (
                resized(grid, side, "nearest")
            ),
            'this is mode="bicubic": the exercise asks for mode="bilinear"': resized(grid, side, "bicubic"),
            "with align_corners=True the centers of the corner patches stay where they are, as if a patch "
            "were a point; a patch is an area, so leave that option out": resized(
                grid, side, "bilinear", True
            ),
        }
        for hint, mistake in mistakes.items():
            expect(same(truth, mistake) or not same(result, mistake), hint)
        if isinstance(result, Tensor):
            expect(
                tuple(result.shape) not in {(6, side * side), (1, 6, side, side), (6, side, side)},
                f"the result has shape {list(result.shape)}: bring it back to [new_side * new_side, D]",
            )
        expect_tensor(result, truth, f"the table for {side} x {side} patches")
    right("neighbors on the grid are mixed, along rows and columns, when it grows and when it shrinks.")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
