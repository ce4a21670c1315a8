"""The processor of DeepSeek-VL with two towers: as deepseek_vl.py, and every picture in two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minivlm.processing.deepseek_vl import DeepseekVLProcessor
from minivlm.processing.inputs import Inputs
from minivlm.processing.squares import DeepseekVLHybridImageProcessor, DeepseekVLImageProcessor
from minivlm.processing.video import Video


class DeepseekVLHybridProcessor(DeepseekVLProcessor):
    """Arguments as of `DeepseekVLProcessor`."""

    processor_class = "DeepseekVLHybridProcessor"
    pictures_class: ClassVar[type[DeepseekVLImageProcessor]] = DeepseekVLHybridImageProcessor
    image_processor: DeepseekVLHybridImageProcessor

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the towers read of all pictures of a batch, in order.

        Returns:
          pixel_values           [M, C, H, W], the small squares
          high_res_pixel_values  [M, C, H, W], the large ones
        """
        small, large = self.image_processor.read(cast(Sequence[Image.Image], pictures))
        return {"pixel_values": small, "high_res_pixel_values": large}

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """Versions of a small square [M, C, H, W] -> both squares.

        Where a version differs from the small square of `inputs`, the large one shows the same color: what is
        hidden in one is hidden in both.
        """
        large = inputs["high_res_pixel_values"]
        hidden = (pictures != inputs["pixel_values"]).any(dim=1, keepdim=True).float()  # [M, 1, H, W]
        (mean, std), (high_mean, high_std) = (
            (_per_channel(read.image_mean, pictures), _per_channel(read.image_std, pictures))
            for read in (self.image_processor, self.image_processor.high_res)
        )
        shown = (pictures * std + mean - high_mean) / high_std
        hidden, shown = (F.interpolate(part, large.shape[-2:], mode="nearest") for part in (hidden, shown))
        return {"pixel_values": pictures, "high_res_pixel_values": torch.where(hidden > 0, shown, large)}


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
