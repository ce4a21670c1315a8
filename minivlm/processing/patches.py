"""Pictures of any size as rows of patches: how Qwen2-VL (https://arxiv.org/abs/2409.12191) reads pixels.

    picture -> sides rounded to multiples of 28 pixels, area within limits -> patches of 14 x 14, in a row

Nothing is squashed, cropped or padded: a picture keeps its shape to within half a multiple on each side, and
its area, unless that is below `min_pixels` or above `max_pixels`. 28 x 28 pixels are an image token of 2 x 2
patches. They stand next to each other in the row, so that the merger can join them by a change of shape:

     0  1 |  4  5
     2  3 |  6  7      the first two image tokens of a row, and the next two
    ------+------
     8  9 | 12 13
    10 11 | 14 15

A patch is two frames deep. A picture is a film of one frame, and as in any film with an odd number of frames,
the last one is shown again.

Sources: `vision_process.py` of https://github.com/QwenLM/Qwen2.5-VL, and Qwen2VLImageProcessorPil in
transformers, which this equals bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.images import Fitted, ImageProcessor, rescale_and_normalize, to_rgb

MAX_RATIO = 200  # of the longer side to the shorter one


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: float, least: int = 0
) -> tuple[int, int]:
    """The size at which a picture is read: multiples of `factor` near its own, in its shape.

    >>> smart_resize(300, 400, 28, 56 * 56, 1280 * 28 * 28)
    (308, 392)

    Args:
        factor: pixels of an image token on each side.
        min_pixels, max_pixels: limits of the area. A side may still be one factor long in any case.
        least: what a side is rounded up to at least before its area is compared: 0 in transformers, `factor`
            in the original program. They differ only where a side is half a factor or less.

    Returns:
        (height, width).
    Raises:
        InputError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            f"the picture has {width} x {height} pixels, and one side is more than {MAX_RATIO} times as long "
            "as the other: crop it to the part that matters"
        )
    # Python rounds halves to the even number, here and in both programs: 42 becomes 56, and 70 becomes 56.
    sides = tuple(max(least, round(side / factor) * factor) for side in (height, width))
    if sides[0] * sides[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = tuple(max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif sides[0] * sides[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return sides[0], sides[1]


def cut_into_patches(
    frames: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int
) -> tuple[Tensor, list[int]]:
    """Frames of one picture or video as a row of patches.

    Args:
        frames: [F, C, height, width], sides divisible by patch_size * merge_size. The last is repeated until
            the frames fill whole patches.

    Returns:
        [patches, C * temporal_patch_size * patch_size^2], and the grid [steps, rows, columns].
    """
    missing = -len(frames) % temporal_patch_size
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    grid = [
        len(frames) // temporal_patch_size,
        frames.shape[2] // patch_size,
        frames.shape[3] // patch_size,
    ]
    steps, rows, columns = grid
    within = merge_size, patch_size
    patches = frames.view(
        steps,
        temporal_patch_size,
        frames.shape[1],
        rows // merge_size,
        *within,
        columns // merge_size,
        *within,
    )
    # [step, token row, token column, row in it, column in it, C, frame, pixel row, pixel column]
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.flatten(5).flatten(0, 4), grid


def join_patches(
    patches: Tensor, grid: Sequence[int], patch_size: int, temporal_patch_size: int, merge_size: int
) -> Tensor:
    """The frames [F, C, height, width] of one picture or video, from its patches and their grid."""
    steps, rows, columns = grid
    tokens = steps, rows // merge_size, columns // merge_size, merge_size, merge_size
    frames = patches.view(*tokens, -1, temporal_patch_size, patch_size, patch_size)
    frames = frames.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return frames.reshape(
        steps * temporal_patch_size, frames.shape[2], rows * patch_size, columns * patch_size
    )


@dataclass(frozen=True)
class Qwen2VLImageProcessor(ImageProcessor):
    """The settings of a Qwen2-VL or Qwen2.5-VL folder's preprocessor_config.json.

    `image_size` is the side of the largest square that is read as it is.
    """

    kind: ClassVar[str] = "Qwen2VLImageProcessor"
    old_kind: ClassVar[str] = "Qwen2VLFeatureExtractor"

    image_size: int = field(init=False, default=0)
    image_mean: tuple[float, ...] = CLIPImageProcessor.image_mean
    image_std: tuple[float, ...] = CLIPImageProcessor.image_std
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    patch_size: int = 14  # pixels, height = width
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2  # patches on a side of an image token

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not max(self.min_pixels, self.factor**2) <= self.max_pixels:
            raise InputError(
                f"max_pixels is {self.max_pixels}: expected room for min_pixels ({self.min_pixels}) and for "
                f"an image token of {self.factor} x {self.factor} pixels"
            )
        side = math.isqrt(self.max_pixels) // self.factor * self.factor
        object.__setattr__(self, "image_size", side)
        super().__post_init__()

    @property
    def factor(self) -> int:
        """Pixels of an image token on each side."""
        return self.patch_size * self.merge_size

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        """As the last arguments of `cut_into_patches`."""
        return self.patch_size, self.temporal_patch_size, self.merge_size

    @property
    def fitted(self) -> Fitted:
        """A long picture stays long."""
        return "kept"

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) at which a picture is read. Raises InputError: as `smart_resize`."""
        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return width, height

    def num_tokens(self, width: int, height: int) -> int:
        """Image tokens of a picture. Raises InputError: as `smart_resize`."""
        width, height = self.size_of(width, height)
        return width * height // self.factor**2

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> RGB, upright, with sides that are whole numbers of image tokens.

        Raises InputError: as `smart_resize` and `to_rgb`.
        """
        picture = to_rgb(image)
        return picture.resize(self.size_of(*picture.size), Image.Resampling(self.resample))

    def read(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Pictures of any sizes and modes -> patches of all of them, fp32, and their grids [M, 3].

        Raises InputError: no pictures; otherwise as `fit`.
        """
        return self.read_fitted([[self.fit(image)] for image in images])

    def read_fitted(self, films: Sequence[Sequence[Image.Image]]) -> tuple[Tensor, Tensor]:
        """The same for films whose frames have the right size already."""
        if not films:
            raise InputError("there are no pictures: give at least one")
        settings = self.image_mean, self.image_std, self.rescale_factor
        cut = [
            cut_into_patches(
                torch.stack([rescale_and_normalize(frame, *settings) for frame in frames]), *self.patch_sizes
            )
            for frames in films
        ]
        return torch.cat([patches for patches, _ in cut]), torch.tensor([grid for _, grid in cut])

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """The patches of `read` alone."""
        return self.read(images)[0]

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, int]:
        size = values.get("size") or {}
        found = {name: values.get(name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
        # The old names, which some files have inside of `size`, and the new ones. The old ones win.
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            found[name] = values.get(name) or size.get(name) or size.get(edge)
        return {name: int(value) for name, value in found.items() if value is not None}

    def _size_to_dict(self) -> dict[str, Any]:
        return {
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
        }
