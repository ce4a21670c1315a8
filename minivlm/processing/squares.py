"""DeepSeek-VL's image processors: the whole picture in a square, in one size or in two.

The long side is resized, and bars of the mean color fill the square, so nothing is lost or distorted; LLaVA
pads first and resizes then. For two towers, there are two squares: the large one is made from the picture,
the small one from the large one, and each has a mean and a deviation of its own. Published folders have 384
pixels, from -1 to 1, for SigLIP, and 1,024 pixels, normalized as CLIP's, for SAM.

Pixels equal those of the PIL processors of `transformers` bit for bit. The original program rounds sides
down where these round to the nearest, and shrinks the large square inside of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.images import Fitted, ImageProcessor, rescale_and_normalize, to_rgb


def into_square(
    image: Image.Image, side: int, resample: int, color: Sequence[float], min_size: int
) -> Image.Image:
    """An RGB picture, as large as it gets, in the middle of a square of this color (each from 0 to 1).

    Args:
        min_size: pixels that the short side keeps at least, however long the picture is.
    """
    scale = side / max(image.size)
    width, height = (max(round(length * scale), min_size) for length in image.size)
    resized = image.resize((width, height), Image.Resampling(resample))
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in color))
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


@dataclass(frozen=True)
class DeepseekVLImageProcessor(ImageProcessor):
    """One square. A setting that a folder leaves out is that of transformers, where CLIP's mean is meant."""

    kind: ClassVar[str] = "DeepseekVLImageProcessor"
    old_kind: ClassVar[str] = kind
    supported: ClassVar[dict[str, bool]] = {**ImageProcessor.supported, "do_pad": True}

    image_size: int = 384
    image_mean: tuple[float, ...] = CLIPImageProcessor.image_mean
    image_std: tuple[float, ...] = CLIPImageProcessor.image_std
    min_size: int = 14

    @property
    def fitted(self) -> Fitted:
        """How a long picture becomes a square."""
        return "padded"

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> RGB of image_size x image_size, with bars. Raises InputError: as `to_rgb`."""
        return into_square(to_rgb(image), self.image_size, self.resample, self.image_mean, self.min_size)

    def _normalized(self, squares: Sequence[Image.Image]) -> Tensor:
        settings = self.image_mean, self.image_std, self.rescale_factor
        return torch.stack([rescale_and_normalize(square, *settings) for square in squares])

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        size = values.get("size") or {"height": 384, "width": 384}
        return {**super()._read_size({"size": size}), "min_size": int(values.get("min_size") or 14)}

    def _size_to_dict(self) -> dict[str, Any]:
        return {**super()._size_to_dict(), "min_size": self.min_size, "do_pad": True}


@dataclass(frozen=True)
class DeepseekVLHybridImageProcessor(DeepseekVLImageProcessor):
    """Two squares: the fields here say how the small one is made from the large one."""

    kind: ClassVar[str] = "DeepseekVLHybridImageProcessor"
    old_kind: ClassVar[str] = kind

    high_res: DeepseekVLImageProcessor = DeepseekVLImageProcessor(image_size=1024)

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> the small square. Raises InputError: as `to_rgb`."""
        return super().fit(self.high_res.fit(image))

    def read(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Both squares of each picture, [B, C, H, W] fp32, the small ones first.

        Raises InputError: as a call.
        """
        large = [self.high_res.fit(image) for image in images]
        small = [DeepseekVLImageProcessor.fit(self, image) for image in large]
        return self._normalized(small), self.high_res._normalized(large)

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        prefix = "high_res_"
        large = {name.removeprefix(prefix): values[name] for name in values if name.startswith(prefix)}
        large.setdefault("size", {"height": 1024, "width": 1024})
        large |= {name: values.get(name) for name in ("min_size", "rescale_factor")}
        return {**super()._read_size(values), "high_res": DeepseekVLImageProcessor.from_dict(large)}

    def _size_to_dict(self) -> dict[str, Any]:
        large = self.high_res.to_dict()
        names = ("size", "resample", "image_mean", "image_std")
        return {**super()._size_to_dict(), **{f"high_res_{name}": large[name] for name in names}}
