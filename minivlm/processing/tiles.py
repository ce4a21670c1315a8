"""Tiles: how LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) sees a large picture.

A tower reads a square of fixed size. So the picture is also cut into several such squares:

    picture -> squeezed into one square                                base view ┐
            -> resized and padded to a grid of squares -> cut apart    tiles     ┴-> tower -> tokens

The grid is the one that keeps the most pixels of the picture, and of equals the one that wastes the fewest.
The tokens of the tiles are put together again as one picture. What shows only padding is cut off, so their
number depends on the picture's shape. A learned `newline` after each row of tokens says where the row ends.

Sources: `mm_utils.py` and `llava_arch.py` of https://github.com/haotian-liu/LLaVA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import ImageProcessor, rescale_and_normalize, to_rgb

Grid = tuple[int, int]  # rows and columns of tiles

GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


class Tiles(NamedTuple):
    """A picture as the tower reads it."""

    pixel_values: Tensor  # [1 + rows * columns, C, height, width], the base view first
    grid: Grid
    width: int  # pixels of the upright picture
    height: int


def cut_into_tiles(
    image: Image.Image, image_processor: ImageProcessor, grids: Sequence[Grid] = GRIDS
) -> Tiles:
    """Base view and tiles of a picture. Matches `LlavaNextImageProcessorPil` in transformers bit for bit.

    Args:
        image_processor: its image_size is the side of a tile; mean and std are as usual.

    Raises InputError: as `to_rgb` and `choose_grid`.
    """
    picture, side = to_rgb(image), image_processor.image_size
    resample = Image.Resampling(image_processor.resample)
    rows, columns = choose_grid(picture.width, picture.height, side, grids)
    padded = resize_and_pad(picture, columns * side, rows * side, resample)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    views = [padded.crop((left, top, left + side, top + side)) for left, top in corners]
    views.insert(0, picture.resize((side, side), resample))
    settings = image_processor.image_mean, image_processor.image_std, image_processor.rescale_factor
    pixel_values = torch.stack([rescale_and_normalize(view, *settings) for view in views])
    return Tiles(pixel_values, (rows, columns), picture.width, picture.height)


def choose_grid(width: int, height: int, side: int, grids: Sequence[Grid] = GRIDS) -> Grid:
    """The grid of tiles, side x side pixels each, for a picture of width x height.

    Raises InputError: a picture so narrow that nothing of it would be left on any grid.
    """

    def kept_and_wasted(grid: Grid) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * side / width, rows * side / height)
        # Enlarging a picture adds no pixels that were not there before.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * side * side

    best = max(grids, key=kept_and_wasted)  # the first of several that are equal
    if kept_and_wasted(best)[0] == 0:
        raise InputError(
            f"the picture has {width} x {height} pixels, too narrow for any grid of tiles: crop it to the "
            "part that matters"
        )
    return best


def resize_and_pad(picture: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """The whole picture in its own shape, as large as fits, in the middle of a black one."""
    scale_x, scale_y = width / picture.width, height / picture.height
    if scale_x < scale_y:
        size = width, min(math.ceil(picture.height * scale_x), height)
    else:
        size = min(math.ceil(picture.width * scale_y), width), height
    padded = Image.new("RGB", (width, height))
    padded.paste(picture.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2))
    return padded


def arrange_tokens(features: Tensor, newline: Tensor, grid: Grid, width: int, height: int) -> Tensor:
    """The tokens of one picture in the order in which a decoder reads them.

    Args:
        features: [1 + rows * columns, n * n, D], of the base view and the tiles.
        newline: [D].
        grid, width, height: as in `Tiles`.

    Returns:
        [`num_tokens`, D]: the base view, then the rows of the whole picture, each with a newline.

    Raises ValueError: another number of tiles than in the grid, or tiles that are no squares of tokens.
    """
    (rows, columns), n = grid, math.isqrt(features.shape[1])
    if len(features) != 1 + rows * columns:
        raise ValueError(
            f"got features of {len(features)} tiles, expected {1 + rows * columns}: the base view and "
            f"{rows} x {columns} tiles"
        )
    if n * n != features.shape[1]:
        raise ValueError(f"a tile has {features.shape[1]} tokens, expected a square without a class token")
    base, tiles = features[0], features[1:].unflatten(0, grid).unflatten(2, (n, n))
    whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows * n, columns * n, D]
    whole = whole[without_padding(rows * n, columns * n, width, height)]
    ends = newline.to(whole).expand(len(whole), 1, -1)
    return torch.cat([base, torch.cat([whole, ends], dim=1).flatten(0, 1)])


def num_tokens(width: int, height: int, grid: Grid, n: int) -> int:
    """Image tokens of a picture of width x height whose tiles have n x n tokens each."""
    rows, columns = grid[0] * n, grid[1] * n
    down, across = (
        len(range(size)[part])
        for size, part in zip((rows, columns), without_padding(rows, columns, width, height), strict=True)
    )
    return n * n + down * (across + 1)


def without_padding(rows: int, columns: int, width: int, height: int) -> tuple[slice, slice]:
    """Which rows and columns of tokens show the picture; half of what is left over is cut off on each side.

    The picture keeps int(round(x, 7)) rows or columns, as in transformers. The original takes int(x), and
    where x is 14.999999999999998 cuts off one more on each side: 8 of all sizes below 400 x 400.
    """

    def fitted(size: int, scale: float) -> int:
        return int(round(size * scale, 7))

    if width / height > columns / rows:
        margin = (rows - fitted(height, columns / width)) // 2
        return slice(margin, rows - margin), slice(0, columns)
    margin = (columns - fitted(width, rows / height)) // 2
    return slice(0, rows), slice(margin, columns - margin)
