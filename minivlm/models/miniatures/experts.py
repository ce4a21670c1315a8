"""LLaVA with DeepSeek-VL2's experts (https://arxiv.org/abs/2412.10302) in place of each MLP.

    picture -> SigLIP -> MLP -> N image tokens ┐
                                               ├-> Llama's attention, experts -> answer
    chat    -> embedding table ----------------┘

Attention is Llama's, as in deepseek-vl2-tiny: a gate and its experts are all that differs from LLaVA. With k
of them and the shared one as wide together as LLaVA's MLP, a token meets as many weights as there, and the
model has several times more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import Tensor

from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.models.llava import LlavaProjector
from minivlm.models.miniatures.base import read_values, write_values
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.text.deepseek_v2 import DeepseekV2Config, DeepseekV2Decoder
from minivlm.text.moe import MoEConfig
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class ExpertsConfig:
    """The default decoder has the widths of DeepSeek's program, and experts in all layers."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: DeepseekV2Config = field(default_factory=lambda: DeepseekV2Config(mla=None, moe=MoEConfig()))
    image_token_id: int = 100015
    pad_token_id: int = 100001
    bos_token_id: int = 100000
    eos_token_id: int | tuple[int, ...] = 100001

    def __post_init__(self) -> None:
        check_types(self)
        if self.text.mla is not None or self.text.moe is None:
            raise InputError(
                "text_config has latent attention, or no experts: here attention is Llama's (use_mla false), "
                "and MLPs are experts (n_routed_experts)"
            )

    @property
    def image_size(self) -> int:
        """Pixels of a picture's side."""
        return self.vision.image_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpertsConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "llava_experts", text=DeepseekV2Config))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "llava_experts")


class LlavaExperts(LlamaMiniature):
    """The whole system."""

    config_class: ClassVar = ExpertsConfig
    decoder_class: ClassVar = DeepseekV2Decoder
    config: ExpertsConfig

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = LlavaProjector(cast(Any, config))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image features [B, N, D]."""
        return self.multi_modal_projector(self.patches(pixel_values))
