"""LLaVA's processor for models that make a second view, half as wide and high, of each picture themselves.

The model gets the large picture alone. Who looks at the model is shown the small view, whose patches have
places in the decoder's row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.processing.inputs import Inputs
from minivlm.processing.llava import LlavaProcessor


def halved(pixel_values: Tensor) -> Tensor:
    """[B, C, height, width] -> [B, C, height / 2, width / 2], the mean of each 2 x 2 pixels."""
    return F.avg_pool2d(pixel_values, 2)


class HalvedProcessor(LlavaProcessor):
    """Arguments as of `LlavaProcessor`; the picture's side is that of the large view."""

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The small views: [M, C, height, width]."""
        return halved(inputs["pixel_values"])

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """Versions of a small view [M, C, height, width] -> large pictures whose small views they are.

        Where a version differs from the small view of `inputs`, the large one shows its color: what is hidden
        in one is hidden in both.
        """
        shown = self.to_pictures(inputs)
        changed = (pictures != shown).any(dim=1, keepdim=True).float()
        changed, pictures, added = (
            F.interpolate(part, scale_factor=2.0, mode="nearest")
            for part in (changed, pictures, pictures - shown)  # the last is 0, and carries the gradient
        )
        return {"pixel_values": torch.where(changed > 0, pictures, inputs["pixel_values"] + added)}
