"""A picture of twice the tower's side, shrunk: what LLaVA makes of it, and loses.

    picture -> mean of each 2 x 2 pixels -> SigLIP -> MLP -> N image tokens ┐
                                                                            ├-> Llama -> answer
    chat    -> embedding table ---------------------------------------------┘

Beside it stand tiles.py and two_towers.py, which read the same pictures without the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import Tensor

from minivlm.configs import check_types
from minivlm.models.llava import LlavaProjector
from minivlm.models.miniatures.base import read_values, write_values
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.processing.halved import HalvedProcessor, halved
from minivlm.text.llama import LlamaConfig
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class OneViewConfig:
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
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OneViewConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "llava_one_view", text=LlamaConfig))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "llava_one_view")


class OneView(LlamaMiniature):
    """The whole system."""

    config_class: ClassVar = OneViewConfig
    processor_class: ClassVar = HalvedProcessor
    config: OneViewConfig

    def __init__(self, config: OneViewConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = LlavaProjector(cast(Any, config))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, 2 * side, 2 * side] -> image features [B, N, D]."""
        return self.multi_modal_projector(self.patches(halved(pixel_values)))
