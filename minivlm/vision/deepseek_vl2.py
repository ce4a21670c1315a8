"""What DeepSeek-VL2 (https://arxiv.org/abs/2412.10302, section 3.1) makes of SigLIP's patches.

    384 pixels -> SigLIP -> 27 x 27 patches -> 28 x 28 with zeros -> 2 x 2 in one -> 14 x 14 tokens

The tower is SigLIP's, with the tanh form of GELU, read to its end and with the last norm. Its config has the
words of timm. A token keeps all that its four patches say: they lie one behind the other in a vector four
times as wide, which two linear layers bring to the width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.configs import expect
from minivlm.errors import InputError
from minivlm.processing.deepseek_vl2 import same_places
from minivlm.processing.deepseek_vl2_tiles import arrange_views
from minivlm.vision.siglip import SiglipVisionConfig

SIGLIP_SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


def tower_from_dict(values: Mapping[str, Any]) -> SiglipVisionConfig:
    """From the `vision_config` part of a config.json. What it leaves out is as in the original program.

    Raises InputError: a class token, another output than that of all patches, a value that is no number.
    """
    for name, supported in {"global_pool": "map", "ignore_head": True, "class_token": False}.items():
        expect(values, "vision_config", name, supported)
    found = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4}
    found |= {name: values[name] for name in found if values.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"vision_config has {name} = {value!r}, expected a number: download it again")
    return SiglipVisionConfig(
        hidden_size=found["width"],
        intermediate_size=int(found["width"] * found["mlp_ratio"]),
        num_hidden_layers=found["layers"],
        num_attention_heads=found["heads"],
        image_size=found["image_size"],
        patch_size=found["patch_size"],
    )


def tower_to_dict(config: SiglipVisionConfig) -> dict[str, Any]:
    """The other way around."""
    return {
        "model_type": "vision",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        # A hair more, so that what is rounded down is the right number.
        "mlp_ratio": (config.intermediate_size + 1e-3) / config.hidden_size,
    }


class DownsampleProjector(nn.Module):
    """Joins squares of ratio x ratio patches, then two linear layers with the exact GELU between them."""

    def __init__(self, vision_width: int, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.linear1 = nn.Linear(vision_width * ratio**2, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, side, side, D_image] -> [B, n, n, D]. What is missing for a whole square is zeros.

        A token lists the patches of its square channel by channel, not patch by patch.
        """
        short = -x.shape[1] % self.ratio
        x = F.pad(x, (0, 0, 0, short, 0, short))
        x = x.unflatten(2, (-1, self.ratio)).unflatten(
            1, (-1, self.ratio)
        )  # [B, n, ratio, n, ratio, D_image]
        return self.linear2(F.gelu(self.linear1(x.permute(0, 1, 3, 5, 2, 4).flatten(3))))


def places_of_tokens(
    config: SiglipVisionConfig, ratio: int, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """How much of each token of a picture is of each patch of the view of the whole: [n, N].

    A token of that view is of its patches, and one of a tile of the patch that shows its middle. Newlines,
    the separator, and what only shows bars are of none.

    Args:
        ratio: patches, on a side, in a token.
        grid: columns and rows of tiles.
        size: width and height of the picture.
    """
    side, pixels, (columns, rows) = config.image_size // config.patch_size, config.image_size, grid
    patches = torch.eye(side * side).view(side, side, -1)  # [side, side, N]
    squares = F.avg_pool2d(patches.permute(2, 0, 1), ratio, ceil_mode=True)  # [N, n, n]
    n = squares.shape[-1]
    starts = torch.arange(n) * ratio
    middles = (starts + (starts + ratio).clamp(max=side)) * config.patch_size // 2
    across, down = (
        (places.view(-1, pixels)[:, middles].flatten() // config.patch_size).clamp(max=side - 1)
        for places in same_places(*size, (columns * pixels, rows * pixels), (pixels, pixels))
    )
    is_picture = (down[:, None] >= 0) & (across >= 0)  # [rows * n, columns * n]
    tiles = patches[down.clamp(min=0)][:, across.clamp(min=0)] * is_picture[..., None]
    tiles = tiles.unflatten(1, (columns, n)).unflatten(0, (rows, n)).transpose(1, 2).flatten(0, 1)
    views = torch.cat([squares.permute(1, 2, 0)[None], tiles])  # [1 + tiles, n, n, N]
    no_place = torch.zeros(side * side)
    return arrange_views(views, no_place, no_place, grid)
