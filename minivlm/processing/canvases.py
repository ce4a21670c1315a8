"""Pictures on a canvas of tiles: how Llama 3.2 Vision (https://arxiv.org/abs/2407.21783) reads pixels.

    picture, in its shape -> top left on a black canvas of rows x columns tiles -> one tile after the other

A tile is a square that the tower can read. With four of them there are eight canvases, from one tile to four
in a row, a column or a square. Their numbers, from 1 on, are the `aspect_ratio_ids` that tell the model how
its tiles lie; 0 would be no picture. A picture gets the canvas on which it is enlarged least, or, where none
holds it, reduced least. It is itself enlarged only up to the side of one tile: what is left over is black.

What differs from LLaVA's tiles in tiles.py: there is no base view of the whole, the picture lies in a corner
and not in the middle, and every picture comes as the same number of tiles, of which the last may be empty.

Sources: `image_transform.py` of https://github.com/meta-llama/llama-models, and MllamaImageProcessorPil in
transformers, which this equals bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import BILINEAR, Fitted, ImageProcessor, rescale_and_normalize, to_rgb

Canvas = tuple[int, int]  # rows and columns of tiles

MOST_TILES = 64


def supported_canvases(max_image_tiles: int) -> list[Canvas]:
    """All that have so many tiles at most, in the order of their ids, which count from 1.

    >>> supported_canvases(4)
    [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    """
    sides = range(1, max_image_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_image_tiles]


def choose_canvas(width: int, height: int, side: int, max_image_tiles: int) -> Canvas:
    """The canvas for a picture of width x height, with tiles of side x side pixels.

    >>> choose_canvas(1000, 400, 448, 4)
    (1, 3)
    """
    scales = {
        (rows, columns): min(columns * side / width, rows * side / height)
        for rows, columns in supported_canvases(max_image_tiles)
    }
    enlarged = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarged) if enlarged else max(scales.values())
    fitting = [canvas for canvas, scale in scales.items() if scale == best]
    return min(fitting, key=math.prod)  # the first of several that are equal


def size_on_canvas(width: int, height: int, side: int, canvas: Canvas) -> tuple[int, int]:
    """The (width, height) at which a picture lies on its canvas, at least 1 x 1."""
    rows, columns = canvas
    widest, highest = (
        min(max(size, side), tiles * side) for size, tiles in ((width, columns), (height, rows))
    )
    if widest / width < highest / height:
        return widest, min(math.floor(height * (widest / width)) or 1, highest)
    return min(math.floor(width * (highest / height)) or 1, widest), highest


@dataclass(frozen=True)
class CanvasImageProcessor(ImageProcessor):
    """The settings of a Llama 3.2 Vision folder's preprocessor_config.json.

    `image_size` is the side of a tile. Published folders have the mean and standard deviation of CLIP; what
    a file leaves out is as in transformers.
    """

    kind: ClassVar[str] = "MllamaImageProcessor"
    old_kind: ClassVar[str] = "MllamaFeatureExtractor"
    supported: ClassVar[dict[str, bool]] = {**ImageProcessor.supported, "do_pad": True}

    resample: int = int(BILINEAR)
    max_image_tiles: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_image_tiles <= MOST_TILES:
            raise InputError(f"max_image_tiles is {self.max_image_tiles}: expected 1 to {MOST_TILES}")

    @property
    def fitted(self) -> Fitted:
        """A long picture stays long."""
        return "kept"

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> RGB, upright, on its canvas. Raises InputError: as `to_rgb`."""
        picture, side = to_rgb(image), self.image_size
        rows, columns = canvas = choose_canvas(*picture.size, side, self.max_image_tiles)
        black = Image.new("RGB", (columns * side, rows * side))
        size = size_on_canvas(*picture.size, side, canvas)
        black.paste(picture.resize(size, Image.Resampling(self.resample)))
        return black

    def read(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Pictures of any sizes and modes -> tiles [M, T, C, side, side], fp32, and aspect_ratio_ids [M].

        Raises InputError: no pictures; otherwise as `fit`.
        """
        if not images:
            raise InputError("there are no pictures: give at least one")
        settings = self.image_mean, self.image_std, self.rescale_factor
        cut = [self.cut(rescale_and_normalize(self.fit(image), *settings)[None]) for image in images]
        return torch.cat([tiles for tiles, _ in cut]), torch.cat([ids for _, ids in cut])

    def cut(self, canvases: Tensor) -> tuple[Tensor, Tensor]:
        """Canvases of one size [M, C, height, width] -> tiles [M, T, C, side, side] and ids [M].

        Tiles come row by row, and after them zeros for those that a smaller canvas does not have.

        Raises InputError: no canvas has this size.
        """
        side, supported = self.image_size, supported_canvases(self.max_image_tiles)
        (rows, below), (columns, beside) = (divmod(size, side) for size in canvases.shape[2:])
        if below or beside or (rows, columns) not in supported:
            raise InputError(
                f"a picture of {canvases.shape[3]} x {canvases.shape[2]} pixels is no canvas of at most "
                f"{self.max_image_tiles} tiles of {side} x {side}: let the processor fit it"
            )
        tiles = canvases.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [M, rows * columns, C, side, side]
        empty = tiles.new_zeros(len(tiles), self.max_image_tiles - rows * columns, *tiles.shape[2:])
        ids = torch.full((len(tiles),), supported.index((rows, columns)) + 1, device=tiles.device)
        return torch.cat([tiles, empty], dim=1), ids

    def join(self, tiles: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """The other way around, for canvases of one size. Raises InputError: they are not."""
        if len(aspect_ratio_ids.unique()) > 1:
            raise InputError(
                f"the pictures lie on {len(aspect_ratio_ids.unique())} canvases: look at one at a time"
            )
        rows, columns = supported_canvases(self.max_image_tiles)[int(aspect_ratio_ids[0]) - 1]
        whole = tiles[:, : rows * columns].unflatten(1, (rows, columns))
        return whole.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [M, C, height, width]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The tiles of `read` alone."""
        return self.read(images)[0]

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, int]:
        tiles = values.get("max_image_tiles")
        more = {} if tiles is None else {"max_image_tiles": int(tiles)}
        return {**super()._read_size(values), **more}

    def _size_to_dict(self) -> dict[str, Any]:
        return {**super()._size_to_dict(), "do_pad": True, "max_image_tiles": self.max_image_tiles}
