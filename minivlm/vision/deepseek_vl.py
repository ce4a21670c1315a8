"""What DeepSeek-VL (https://arxiv.org/abs/2403.05525, section 3.1) makes of two towers.

    384 pixels   -> SigLIP ------------------------------------------┐
                                                                     ├-> aligner -> 576 image tokens
    1,024 pixels -> SAM -> 64 x 64 places -> 96 -> 48 -> 24 x 24 ----┘

SigLIP was trained with sentences and knows what is in a picture; at 384 pixels, small letters are gone. SAM
was trained to outline things and sees them at 1,024. Both give a token to each of the same 24 x 24 places, so
the decoder reads as many image tokens as with one tower.

Of SAM, two states are used: the last, and that of the first global block, with a neck of its own and a weight
`alpha` that training starts at 0. The last may say what belongs together, the early one still how it looks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.vision.sam import SamNeck, SamVisionConfig, SamVisionModel


class HighResolutionTower(nn.Module):
    """SAM, then two convolutions that halve the grid and double the channels.

    Args:
        side: tokens in a row, and in a column.
    """

    def __init__(self, config: SamVisionConfig, side: int) -> None:
        super().__init__()
        self.side = side
        channels = config.output_channels
        self.sam = SamVisionModel(config)
        self.early_neck = SamNeck(config)
        self.downsample1 = nn.Conv2d(channels, channels * 2, 3, stride=2, padding=1, bias=False)
        self.downsample2 = nn.Conv2d(channels * 2, channels * 4, 3, stride=2, padding=1, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized for SAM -> [B, N, 4 * output_channels].

        Raises ValueError: as `SamVisionModel`.
        """
        states = list(self.sam.hidden_states(pixel_values))
        early = states[min(self.sam.config.global_attn_indexes) + 1]  # the embeddings come first
        x = self.shrink(self.sam.neck(states[-1])) + self.alpha * self.shrink(self.early_neck(early))
        return x.flatten(2).transpose(1, 2)  # [B, 4 * C, side, side] -> [B, N, 4 * C]

    def shrink(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, 4 * C, side, side]: first to four times that side, in fp32."""
        size = (4 * self.side, 4 * self.side)
        x = F.interpolate(x.float(), size, mode="bilinear", align_corners=False).to(x.dtype)
        return self.downsample2(self.downsample1(x))


class HybridAligner(nn.Module):
    """The tokens of both towers, half of the decoder's width each: high first, then low."""

    def __init__(self, low_width: int, high_width: int, width: int) -> None:
        super().__init__()
        self.low = nn.Linear(low_width, width // 2)
        self.high = nn.Linear(high_width, width // 2)
        self.proj = nn.Linear(width, width)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low [B, N, D_low] and high [B, N, D_high] -> [B, N, D]."""
        return self.proj(F.gelu(torch.cat([self.high(high), self.low(low)], dim=-1)))
