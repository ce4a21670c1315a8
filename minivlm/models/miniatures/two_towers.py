"""DeepSeek-VL's two towers (https://arxiv.org/abs/2403.05525, section 3.1), the second for twice the pixels.

    picture -> shrunk -> SigLIP ┐
                                ├-> aligner -> N image tokens ┐
            -> convolutions ----┘                             ├-> Llama -> answer
    chat    -> embedding table -------------------------------┘

Both give a token to each of the same places, which the aligner of vision/deepseek_vl.py joins by channels, so
the row is as long as with one tower. There, the second is SAM's, which had learned to outline things before.
Here it is a stem as SimVLM's, which can learn with the rest, from nothing. After it, as after SAM, a
convolution halves the grid and doubles the channels (DeepSeek-VL has two). The small view is made inside the
model, as in the original program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from minivlm.configs import check_types, part_of
from minivlm.errors import InputError
from minivlm.models.miniatures.base import read_values, write_values
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.processing.halved import HalvedProcessor, halved
from minivlm.text.llama import LlamaConfig
from minivlm.vision.conv_stem import ConvStem, ConvStemConfig
from minivlm.vision.deepseek_vl import HybridAligner
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class TwoTowersConfig:
    """A SigLIP tower, a stem, a Llama."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    high_res_vision: ConvStemConfig = field(
        default_factory=lambda: ConvStemConfig(image_size=448, patch_size=16)
    )
    text: LlamaConfig = field(default_factory=LlamaConfig)
    image_token_id: int = 32000
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        check_types(self)
        low, high = self.vision, self.high_res_vision
        wanted = (2 * low.image_size, low.patch_size)
        if (high.image_size, high.patch_size) != wanted or low.image_size % low.patch_size:
            raise InputError(
                f"the towers read {low.image_size} and {high.image_size} pixels in patches of "
                f"{low.patch_size} and {high.patch_size}: the second must read twice as many pixels, in "
                "patches of the same size, and no pixel may be left over"
            )

    @property
    def image_size(self) -> int:
        """Pixels of a picture's side."""
        return self.high_res_vision.image_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TwoTowersConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        parts = read_values(cls, values, "llava_two_towers", text=LlamaConfig)
        stem = ConvStemConfig.from_dict(part_of(values, "high_res_vision_config"))
        return cls(**parts, high_res_vision=stem)

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        values = write_values(self, "llava_two_towers")
        stem = values.pop("high_res_vision").to_dict()
        return {**values, "high_res_vision_config": stem}


class TwoTowers(LlamaMiniature):
    """The whole system."""

    config_class: ClassVar = TwoTowersConfig
    processor_class: ClassVar = HalvedProcessor
    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__(config)
        low, high, width = config.vision, config.high_res_vision, config.text.hidden_size
        self.high_res_tower = ConvStem(high)
        self.downsample = nn.Conv2d(high.hidden_size, 2 * high.hidden_size, 3, 2, padding=1, bias=False)
        self.aligner = HybridAligner(low.hidden_size, 2 * high.hidden_size, width)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, 2 * side, 2 * side] -> image features [B, N, D]."""
        side = 2 * self.config.vision.image_size // self.config.vision.patch_size
        high = self.high_res_tower(pixel_values.to(self.downsample.weight.dtype))
        high = self.downsample(high.transpose(1, 2).unflatten(2, (side, side)))  # [B, 2 * D_high, ...]
        low = self.patches(halved(pixel_values))
        return self.aligner(low, high.flatten(2).transpose(1, 2))
