"""DeepSeek-VL2's tiles (https://arxiv.org/abs/2412.10302, section 3.1) for pictures twice as large.

    picture -> shrunk, and 2 x 2 tiles -> SigLIP -> 2 x 2 patches in one token -> rows with newlines ┐
                                                                                                    ├-> Llama
    chat    -> embedding table --------------------------------------------------------------------┘

A tile shows a thing as large as the tower knows it; the view of the whole says where it is, and shows at once
what a cut goes through. Projector, newline and separator are those of the large model, and the picture is
always a square of four tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.configs import check_types
from minivlm.models.miniatures.base import read_values, write_values
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.processing.deepseek_vl2_tiles import arrange_views, num_tokens
from minivlm.processing.halved import HalvedProcessor, halved
from minivlm.processing.inputs import Inputs
from minivlm.text.llama import LlamaConfig
from minivlm.vision.deepseek_vl2 import DownsampleProjector, places_of_tokens
from minivlm.vision.siglip import SiglipVisionConfig

GRID = (2, 2)  # columns and rows
RATIO = 2  # patches, on a side, that become one token


@dataclass(frozen=True)
class TilesConfig:
    """A SigLIP tower, an MLP, a Llama."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: LlamaConfig = field(default_factory=LlamaConfig)
    image_token_id: int = 32000
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def image_size(self) -> int:
        """Pixels of a picture's side."""
        return 2 * self.vision.image_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        side = self.vision.image_size // self.vision.patch_size
        return num_tokens(*GRID, -(-side // RATIO))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TilesConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "llava_tiles", text=LlamaConfig))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "llava_tiles")


def cut(pixel_values: Tensor) -> Tensor:
    """Pictures [B, C, 2 * side, 2 * side] -> each whole, then its tiles row by row: [B, 5, C, side, side]."""
    side = pixel_values.shape[-1] // 2
    tiles = pixel_values.unflatten(3, (2, side)).unflatten(2, (2, side))  # [B, C, 2, side, 2, side]
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, 4, C, side, side]
    return torch.cat([halved(pixel_values)[:, None], tiles], dim=1)


class Tiles(LlamaMiniature):
    """The whole system."""

    config_class: ClassVar = TilesConfig
    processor_class: ClassVar = HalvedProcessor
    config: TilesConfig

    def __init__(self, config: TilesConfig) -> None:
        super().__init__(config)
        width = config.text.hidden_size
        self.projector = DownsampleProjector(config.vision.hidden_size, width, RATIO)
        self.image_newline = nn.Parameter(torch.empty(width))
        self.view_separator = nn.Parameter(torch.empty(width))
        for mark in (self.image_newline, self.view_separator):
            nn.init.normal_(mark, std=width**-0.5)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, 2 * side, 2 * side] -> image features [B, n, D]."""
        side = self.config.vision.image_size // self.config.vision.patch_size
        patches = self.patches(cut(pixel_values).flatten(0, 1)).unflatten(1, (side, side))
        views = self.projector(patches).unflatten(0, (len(pixel_values), -1))  # [B, 5, n, n, D]
        marks = self.image_newline, self.view_separator
        return torch.stack([arrange_views(of_picture, *marks, GRID) for of_picture in views])

    def places_of_tokens(self, pixels: Inputs) -> Tensor:
        """As in `minivlm.models.protocols.HasTiles`: the places are the patches of the view of the whole."""
        size = (self.config.image_size, self.config.image_size)
        return places_of_tokens(self.config.vision, RATIO, GRID, size).to(self.device)
