"""The image processors of CLIP and of the original ViT: how they differ from SigLIP's in images.py.

- ViT: resized to a square, aspect ratio not kept, but with the bilinear filter.
- CLIP: the short side is resized and the central square cropped, so shapes are not distorted, but the ends of
  a long picture are lost. Mean and standard deviation are those of CLIP's training pictures, per channel.

Where an odd number of pixels is left over, half of them is rounded to the even number, as in the program that
CLIP was trained with and in open_clip, both by torchvision. transformers rounds down, and so sees the picture
shifted by one pixel for about a quarter of all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from minivlm.errors import InputError
from minivlm.processing.images import BILINEAR, Fitted, ImageProcessor, to_rgb


@dataclass(frozen=True)
class ViTImageProcessor(ImageProcessor):
    """The settings of a ViT folder's preprocessor_config.json."""

    kind: ClassVar[str] = "ViTImageProcessor"
    old_kind: ClassVar[str] = "ViTFeatureExtractor"

    resample: int = int(BILINEAR)

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, int]:
        size = values.get("size")
        if isinstance(size, int):  # old files: one number for both sides
            values = {**values, "size": {"height": size, "width": size}}
        return super()._read_size(values)


@dataclass(frozen=True)
class CLIPImageProcessor(ImageProcessor):
    """The settings of a CLIP folder's preprocessor_config.json. `image_size` is the side of the crop."""

    kind: ClassVar[str] = "CLIPImageProcessor"
    old_kind: ClassVar[str] = "CLIPFeatureExtractor"
    supported: ClassVar[dict[str, bool]] = {**ImageProcessor.supported, "do_center_crop": True}

    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def fitted(self) -> Fitted:
        """How a long picture becomes a square."""
        return "cropped"

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> its center as RGB of image_size x image_size.

        Raises InputError: a picture so narrow that it would not fit into memory once resized; as `to_rgb`.
        """
        image = to_rgb(image)
        short, long = sorted(image.size)
        resized = int(self.image_size * long / short)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and resized * self.image_size > limit:
            raise InputError(
                f"the picture has {image.width} x {image.height} pixels, and its long side would become "
                f"{resized}: crop it to the part that matters"
            )
        upright = image.height > image.width
        size = (self.image_size, resized) if upright else (resized, self.image_size)
        image = image.resize(size, Image.Resampling(self.resample))
        left, top = (self.margin(side - self.image_size) for side in image.size)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    @staticmethod
    def margin(spare: int) -> int:
        """Half of the pixels that are left over, as torchvision rounds it, see above."""
        return round(spare / 2)

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any], image_size: int) -> CLIPImageProcessor:
        """From the `preprocess_cfg` part of an open_clip_config.json, for towers of that `image_size`.

        Raises InputError: pictures are to be prepared in another way than CLIP's.
        """
        processor = cls(image_size=image_size)
        for name, expected in {**processor.to_open_clip(), "mode": "RGB", "size": image_size}.items():
            value = values.get(name) or expected
            if value != expected:
                raise InputError(
                    f"preprocess_cfg has {name} = {value!r}; only {expected!r} is supported here"
                )
        return processor

    def to_open_clip(self) -> dict[str, Any]:
        """The `preprocess_cfg` part of an open_clip_config.json."""
        return {
            "mean": list(self.image_mean),
            "std": list(self.image_std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, int]:
        short, crop = values.get("size", 224), values.get("crop_size", 224)
        if isinstance(short, Mapping):
            short = short.get("shortest_edge")
        if isinstance(crop, Mapping) and crop.get("height") == crop.get("width"):
            crop = crop.get("height")
        if not isinstance(short, int) or short != crop:
            raise InputError(
                f"size is {values.get('size')!r} and crop_size {values.get('crop_size')!r}: expected the "
                "same number for the short side and for the crop, such as 224"
            )
        return {"image_size": short}

    def _size_to_dict(self) -> dict[str, Any]:
        return {
            "size": {"shortest_edge": self.image_size},
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
        }
