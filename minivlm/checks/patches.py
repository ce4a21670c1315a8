"""Checks for 01_patches: cutting pictures, the tokens of a picture, positions, a class token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, call, expect, right, same

Cut = Callable[[Tensor, int], Tensor]


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
    def first_pixel(cut: Cut, size: int, patch_size: int) -> tuple[int, int]:
        """Row and column of the pixel with which the first patch begins."""
        numbers = torch.arange(3 * size * size).view(1, 3, size, size)
        first = int(cut(numbers, patch_size)[0, 0, 0])
        return first // size % size, first % size

    @staticmethod
    def notices() -> dict[str, bool]:
        """Which means over all tokens change if the patches are shuffled."""
        return {
            "patches": False,
            "patches + positions": False,
            "linear(patches + positions)": False,
            "mlp(patches + positions)": True,
            "attention(patches)": False,
            "attention(patches + positions)": True,
        }

    @staticmethod
    def picture_to_tokens(pixels: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        """pixels [B, C, height, width], weight [D, C, P, P], positions [N, D] -> [B, N, D]."""
        B, C, height, width = pixels.shape
        P = weight.shape[-1]
        rows, columns = height // P, width // P
        x = pixels[:, :, : rows * P, : columns * P].reshape(B, C, rows, P, columns, P)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * P * P)
        return patches @ weight.flatten(1).T + bias + positions

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


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _expect_equal(result: Any, truth: Tensor, mistakes: dict[str, Tensor], what: str, advice: str) -> None:
    """Raise NotYet with the hint of the mistake that gives this result, or with the advice."""
    for hint, mistake in mistakes.items():
        expect(same(truth, mistake) or not same(result, mistake), hint)
    expect(isinstance(result, Tensor), f"{what} should be a tensor, but it is a {type(result).__name__}")
    expect(
        result.shape == truth.shape,
        f"{what} has shape {list(result.shape)}, expected {list(truth.shape)}: {advice}",
    )
    expect(same(result, truth), f"{what} has the right shape and other numbers: {advice}")


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
            3 * truth: f"{case} you counted each color: a patch holds all three, so it is one token",
            rows + columns: f"{case} you added rows and columns: a grid has rows * columns places",
            height * width: f"{case} you counted the pixels: a token stands for a patch of them",
            patch * patch: f"{case} you counted the pixels of a patch, not the patches",
        }
        expect(isinstance(result, int | float), f"{case} you return a {type(result).__name__}, not a number")
        if result != truth:
            hint = f"{case} you return {result}: {rows} rows and {columns} columns of patches fit"
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
    try:
        result = call(answer, patches, rows, columns)
    except NotYet as error:
        if "view size is not compatible" in str(error):
            raise NotYet("after a permute the numbers are not in order in memory: use reshape") from error
        if "is invalid for input of size" in str(error):
            raise NotYet(
                f"{error}. The pieces have to multiply to the size: B, rows, columns, 3, P, P"
            ) from error
        raise
    split = patches.reshape(2, rows, columns, 3, P, P)
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
        "this is patchify's own permute. The way back is its inverse: each axis has to return to where it "
        "came from, so ask of each of the six where it has to go": (
            split.permute(0, 2, 4, 1, 3, 5).reshape(pictures.shape)
        ),
        "rows and columns are exchanged in the permute: pairs are (rows, P) and (columns, P), rows first": (
            split.permute(0, 3, 2, 4, 1, 5).reshape(pictures.shape)
        ),
        "a permute without pairs: rows has to stand directly before the P of y, columns before that of x": (
            split.permute(0, 3, 1, 2, 4, 5).reshape(pictures.shape)
        ),
        "the colors come back in another order: red, green, blue stay as they are": pictures.flip(1),
    }
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (2, rows * P, columns * P, 3),
            "the channels are last, as matplotlib wants them; PyTorch's pictures are [B, 3, height, width]",
        )
        expect(
            tuple(result.shape) != (2, 3, columns * P, rows * P),
            "height and width are swapped: the height is rows * P",
        )
    _expect_equal(
        result, pictures, mistakes, "the picture", "do the steps of patchify backwards, the last one first"
    )
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
        "no positions were added: without them the class token and the patches have no place": (
            torch.cat([tokens, patches], dim=1)
        ),
        "positions are added, not multiplied": torch.cat([tokens, patches], dim=1) * positions,
        "only the first position was added, to all tokens: each of the N + 1 has its own": (
            torch.cat([tokens, patches], dim=1) + positions[0]
        ),
        "the positions run backwards: the class token has position 0": (
            torch.cat([tokens, patches], dim=1) + positions.flip(0)
        ),
    }
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != tuple(patches.shape),
            "the result has as many tokens as there are patches: the class token is one more",
        )
    _expect_equal(
        result,
        solutions.add_class_token(patches, token, positions),
        mistakes,
        "the sequence",
        "class token, then patches, joined along the axis of N, then the positions added",
    )
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
            "the way in is right, the way back is not: a result [1, D, side, side] needs flatten and a "
            "transpose, since a reshape would lay the D numbers of a vector out as neighbors in space": (
                resized(grid, side, "bilinear").T.reshape(side * side, 6)
            ),
            'this is mode="area", which averages whole patches: the exercise asks for bilinear': (
                F.interpolate(grid, size=(side, side), mode="area")[0].flatten(1).T
            ),
            "this is antialias=True, which smooths a table that shrinks: leave that option out": (
                F.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)[0].flatten(1).T
            ),
        }
        if isinstance(result, Tensor):
            expect(
                tuple(result.shape) not in {(6, side * side), (1, 6, side, side), (6, side, side)},
                f"the result has shape {list(result.shape)}: bring it back to [new_side * new_side, D]",
            )
        _expect_equal(
            result,
            truth,
            mistakes,
            f"the table for {side} x {side} patches",
            "make the table a picture [1, D, side, side], resize it, and take the same way back",
        )
    right("neighbors on the grid are mixed, along rows and columns, when it grows and when it shrinks.")


def their_patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """The function of the exercise `first_pixel`: what does not fit is cut off on all four sides alike."""
    return _cut_from(lambda left_over: left_over // 2)(pixels, patch_size)


def _cut_from(start: Callable[[int], int], across: Callable[[int], int] | None = None) -> Cut:
    """Like patchify, but leaves out the first rows and columns: as many as `start` makes of the left over."""

    def cut(pixels: Tensor, patch_size: int) -> Tensor:
        height, width = pixels.shape[2:]
        y, x = start(height % patch_size), (across or start)(width % patch_size)
        return _patchify(pixels[:, :, y:, x:], patch_size)

    return cut


def _patchify(pixels: Tensor, P: int) -> Tensor:
    B, C, height, width = pixels.shape
    rows, columns = height // P, width // P
    x = pixels[:, :, : rows * P, : columns * P].reshape(B, C, rows, P, columns, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * P * P)


CUTS: dict[str, Cut] = {
    "centers its grid": their_patchify,
    "begins at the upper left corner": _patchify,
    "ends at the lower right corner": _cut_from(lambda left_over: left_over),
    "begins one column late": _cut_from(lambda left_over: 0, lambda left_over: min(left_over, 1)),
    "begins with blue, and centers its grid": lambda pixels, P: their_patchify(pixels.flip(1), P),
}


def first_pixel(answer: Callable[..., Any]) -> None:
    """Functions that cut in five ways, for two sizes."""
    for size, P in ((47, 8), (20, 6)):
        for name, cut in CUTS.items():
            numbers = torch.arange(3 * size * size).view(1, 3, size, size)
            token = cut(numbers, P)[0, 0]
            y, x = truth = solutions.first_pixel(cut, size, P)
            result = call(answer, cut, size, P)
            case = f"for a function that {name}, {size} pixels and patches of {P}, you return"
            try:
                row, column = result = tuple(int(value) for value in result)
            except (TypeError, ValueError):
                raise NotYet(f"{case} {result!r}: return two whole numbers, row and column") from None
            last, second = int(token[-1]), int(cut(numbers, P)[0, 1, 0])
            case = f"{case} {result}"
            mistakes = {
                (x, y): "the row comes first, then the column",
                (int(token[0]) // size, x): "the first number may be one of green or blue, which come after "
                "all of red: take the row modulo the size",
                (last // size % size, last % size): "this is the last pixel of the patch",
                (second // size % size, second % size): "this is the second patch: take token 0",
                (
                    int(token[0]) // P % P,
                    int(token[0]) % P,
                ): "divide by the width of the picture, not by that "
                "of a patch: a row of the picture has `size` numbers",
            }
            constant = "do not assume where it begins: number all pixels, cut, and read the first number"
            expect(result == truth, f"{case}: {mistakes.get((row, column), constant)}")
    right("number the pixels, and a function shows where it cuts.")


SHUFFLE = {
    "patches": "a mean of the same vectors in another order is the same mean",
    "patches + positions": "mean(patches + positions) = mean(patches) + mean(positions), and neither of the "
    "two means knows about the order",
    "linear(patches + positions)": "a linear layer of a sum is a sum again, so patch and position still do "
    "not meet: the mean of E(patch + position) is E(mean of patches) + E(mean of positions)",
    "mlp(patches + positions)": "its bent function sees patch and position of a token together, so another "
    "pairing gives other numbers. It need not be attention",
    "attention(patches)": "without positions its output is shuffled as its input is, and the mean stays",
    "attention(patches + positions)": "its softmax sees patches and positions together, so another pairing "
    "gives other weights",
}


def notices(answer: Callable[..., Any]) -> None:
    """Six predictions, each explained if it is wrong."""
    result = call(answer)
    expect(isinstance(result, dict), f"your function returns a {type(result).__name__}: return a dictionary")
    wrong = []
    for name, truth in solutions.notices().items():
        expect(
            name in result,
            f"there is no prediction for {name!r}: the keys are {', '.join(map(repr, SHUFFLE))}",
        )
        expect(
            result[name] is True or result[name] is False,
            f"{name}: write True (the mean changes) or False, not {result[name]!r}",
        )
        if result[name] != truth:
            wrong.append(f"{name}: {truth}, since {SHUFFLE[name]}")
    expect(not wrong, "; ".join(wrong))
    right("a shuffle shows only where something nonlinear sees patch and position together.")


def picture_to_tokens(answer: Callable[..., Any]) -> None:
    """Two pictures that are not square, with pixels left over on both sides."""
    B, D, P, rows, columns = 2, 5, 4, 3, 2
    pixels, weight, bias = _noise(B, 3, rows * P + 1, columns * P + 3), _noise(D, 3, P, P) / 3, _noise(D) + 2
    positions = _noise(rows * columns, D) * 3 - 4
    try:
        result = call(answer, pixels, weight, bias, positions)
    except NotYet as stopped:
        expect(
            "invalid for input of size" not in str(stopped),
            f"{stopped}. These pictures have rows and columns that fill no patch, and a reshape cannot split "
            "them: leave them out first, or cut with F.unfold or F.conv2d",
        )
        raise
    truth = solutions.picture_to_tokens(pixels, weight, bias, positions)
    patches = _patchify(pixels, P)
    grid = F.conv2d(pixels, weight, bias, stride=P)
    turned = weight.permute(0, 2, 3, 1).flatten(1)  # as if patches were flattened y, x, channel
    mistakes = {
        "the positions are missing: add them at the end": truth - positions,
        "the bias is missing": truth - bias,
        "bias and positions are missing": truth - bias - positions,
        "weight and patches are flattened in different orders: [D, 3, P, P] is channel, y, x": (
            patches @ turned.T + bias + positions
        ),
        "D and N are exchanged by a reshape, which moves no number: transpose [B, D, N] to [B, N, D]": (
            grid.flatten(2).reshape(B, rows * columns, D) + positions
        ),
        "the patches run down the columns: count them row by row, as the positions do": (
            grid.mT.flatten(2).mT + positions
        ),
        "the positions were multiplied: add them": (truth - positions) * positions,
        "only the first position was added, to all tokens": truth - positions + positions[0],
        "the mean of the positions was added: each token gets its own": truth - positions + positions.mean(0),
    }
    if isinstance(result, Tensor):
        shapes = {
            (B, D, rows * columns): "transpose: a transformer expects D at the end, [B, N, D]",
            (B, D, rows, columns): "rows and columns are still two axes: flatten them to N, then transpose",
            (B, rows, columns, D): "rows and columns are still two axes: flatten them to N",
            (rows * columns, D): "there are two pictures: keep the axis of the batch",
            (B, rows * columns, 3 * P * P): "these are the patches: multiply each with the weights",
        }
        expect(tuple(result.shape) not in shapes, shapes.get(tuple(result.shape), ""))
    _expect_equal(
        result,
        truth,
        mistakes,
        "the result",
        "cut into patches (what does not fit is dropped), flatten each, multiply with weight.flatten(1).T, "
        "add bias and positions",
    )
    right("patches, one linear layer, positions: this is all of the first layer of an image tower.")
