"""Pictures as DeepSeek-VL2 sees them (https://arxiv.org/abs/2412.10302, section 3.1): whole, and in tiles.

A tower reads a square of fixed size, a tile. Each picture is seen in two ways, in its shape, with bars of the
mean color around it:

    picture -> in one tile                                              the view of the whole ┐
            -> on the candidate that suits it best, rows x columns tiles, cut       its tiles ┴-> tower

The candidates are all grids of at most nine tiles. The best one keeps the most pixels of the picture, and of
equals wastes the fewest, as in LLaVA-NeXT (tiles.py). The tokens of tiles that lie side by side are read row
by row, through all of them, and nothing is cut off:

    a b c newline      view of the whole, 3 x 3 tokens
    d e f newline
    g h i newline
    separator
    1 2 3 4 5 6 newline      two tiles side by side
    ...

Pixels are those of the original program: `ImageOps.pad` of Pillow, bicubic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import Fitted, ImageProcessor, rescale_and_normalize, to_rgb

Size = tuple[int, int]  # width and height, here as in the files


def candidates(side: int, most_tiles: int = 9) -> tuple[Size, ...]:
    """All grids of at most so many tiles, in pixels and in the order of the published files.

    >>> candidates(384, 3)
    ((384, 384), (384, 768), (768, 384), (384, 1152), (1152, 384))
    """
    tiles = range(1, most_tiles + 1)
    grids = [(columns, rows) for columns in tiles for rows in tiles if columns * rows <= most_tiles]
    grids.sort(key=lambda grid: (grid[0] * grid[1], min(grid), grid[0] > grid[1]))
    return tuple((columns * side, rows * side) for columns, rows in grids)


def choose_candidate(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The candidate for a picture of width x height.

    Raises InputError: a picture so narrow that nothing of it would be left on any of them.
    """

    def kept_and_wasted(size: Size) -> tuple[int, int]:
        scale = min(size[0] / width, size[1] / height)
        # Enlarging a picture adds no pixels that were not there before.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    best = max(sizes, key=kept_and_wasted)  # the first of several that are equal
    if kept_and_wasted(best)[0] == 0:
        raise _too_narrow(width, height)
    return best


def place_in(width: int, height: int, size: Size) -> tuple[int, int, int, int]:
    """Left, top, width and height of a picture of width x height in a view of this size, as `ImageOps.pad`.

    Raises InputError: one of its sides would vanish.
    """
    inside = list(size)
    if width / height > size[0] / size[1]:
        inside[1] = round(height / width * size[0])
    elif width / height < size[0] / size[1]:
        inside[0] = round(width / height * size[1])
    if 0 in inside:
        raise _too_narrow(width, height)
    return round((size[0] - inside[0]) / 2), round((size[1] - inside[1]) / 2), inside[0], inside[1]


def _too_narrow(width: int, height: int) -> InputError:
    return InputError(
        f"the picture has {width} x {height} pixels, and in its shape nothing of it would be left in a tile: "
        "crop it to the part that matters"
    )


@dataclass(frozen=True)
class TiledImageProcessor(ImageProcessor):
    """The part of a DeepSeek-VL2 folder's processor_config.json that is about pictures.

    `image_size` is the side of a tile. The first candidate is one tile.
    """

    kind: ClassVar[str] = "DeepseekVLV2Processor"

    image_size: int = 384
    candidate_resolutions: tuple[Size, ...] = candidates(384)

    def __post_init__(self) -> None:
        super().__post_init__()
        side, sizes = self.image_size, self.candidate_resolutions
        if not sizes or sizes[0] != (side, side):
            raise InputError(
                f"candidate_resolutions begin with {list(sizes[:1])}: expected one tile, [{side}, {side}]"
            )
        for size in sizes:
            if len(size) != 2 or any(length < side or length % side for length in size):
                raise InputError(
                    f"candidate_resolutions have {list(size)}: expected width and height of tiles of {side}"
                )

    @property
    def fitted(self) -> Fitted:
        """How a long picture becomes a square: so in the view of the whole."""
        return "padded"

    def pad(self, picture: Image.Image, size: Size) -> Image.Image:
        """An RGB picture in its shape, with bars of the mean color. Raises InputError: as `place_in`."""
        place_in(*picture.size, size)
        color = tuple(int(value * 255) for value in self.image_mean)
        return ImageOps.pad(picture, size, Image.Resampling(self.resample), color)

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> the view of the whole. Raises InputError: as `to_rgb` and `place_in`."""
        return self.pad(to_rgb(image), (self.image_size, self.image_size))

    def read(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """What the tower reads of M pictures of any sizes and modes.

        Returns:
            Views [V, C, side, side] fp32: of each picture the whole, then its tiles row by row; the columns
            and rows of tiles [M, 2]; the width and height of each picture [M, 2].

        Raises InputError: no pictures; otherwise as `fit` and `choose_candidate`.
        """
        if not images:
            raise InputError("there are no pictures: give at least one")
        side, views, grids, sizes = self.image_size, [], [], []
        for image in images:
            picture = to_rgb(image)
            width, height = choose_candidate(*picture.size, self.candidate_resolutions)
            canvas = self.pad(picture, (width, height))
            corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
            views.append(self.fit(picture))
            views += [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
            grids.append((width // side, height // side))
            sizes.append(picture.size)
        settings = self.image_mean, self.image_std, self.rescale_factor
        pixels = torch.stack([rescale_and_normalize(view, *settings) for view in views])
        return pixels, torch.tensor(grids), torch.tensor(sizes)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The views of `read` alone."""
        return self.read(images)[0]

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        sizes = values.get("candidate_resolutions") or ()
        try:
            found = tuple((int(width), int(height)) for width, height in sizes)
        except (TypeError, ValueError) as error:
            raise InputError(f"candidate_resolutions are {sizes!r}: expected pairs of numbers") from error
        if not found:
            raise InputError("candidate_resolutions are missing: use the file of a DeepSeek-VL2 folder")
        return {"image_size": found[0][0], "candidate_resolutions": found}

    def _size_to_dict(self) -> dict[str, Any]:
        return {"candidate_resolutions": [list(size) for size in self.candidate_resolutions]}


def num_tokens(columns: int, rows: int, n: int) -> int:
    """Image tokens of a picture of columns x rows tiles whose views have n x n tokens each.

    >>> num_tokens(1, 1, 14)
    421
    """
    return n * (n + 1) + 1 + rows * n * (columns * n + 1)


def join_tiles(tiles: Tensor, columns: int, rows: int) -> Tensor:
    """Tiles row by row [rows * columns, height, width, D] -> what they were cut from, [..., D]."""
    grid = tiles.unflatten(0, (rows, columns)).transpose(1, 2)  # [rows, height, columns, width, D]
    return grid.flatten(2, 3).flatten(0, 1)


def arrange_views(features: Tensor, newline: Tensor, separator: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens of one picture in the order in which a decoder reads them.

    Args:
        features: [1 + columns * rows, n, n, D], of the view of the whole and of the tiles.
        newline, separator: [D].
        grid: columns and rows.

    Returns:
        [`num_tokens`, D].
    """
    whole, tiles = features[0], join_tiles(features[1:], *grid)
    lines = [
        torch.cat([view, newline.expand(len(view), 1, -1)], dim=1).flatten(0, 1) for view in (whole, tiles)
    ]
    return torch.cat([lines[0], separator[None], lines[1]])
