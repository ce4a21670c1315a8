"""DeepSeek-VL (https://arxiv.org/abs/2403.05525) with two image towers, as in the 7B models.

    384 pixels   -> SigLIP ┐
                           ├-> aligner -> N image tokens ┐
    1,024 pixels -> SAM ---┘                             ├-> Llama -> answer
    chat -> embedding table -----------------------------┘

What differs from deepseek_vl.py: every picture comes twice, as `pixel_values` and `high_res_pixel_values`,
and one image token holds what both towers say of a place. How they are joined is in vision/deepseek_vl.py.

The original program reads the large picture alone, and makes the small one inside the model, from numbers
that are not rounded to 256 levels. Here, as in transformers, the processor makes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minivlm.checkpoints.hub import PICTURES, require_equal
from minivlm.checkpoints.layouts import DEEPSEEK_VL_HYBRID_LAYOUTS, Layout
from minivlm.configs import check_types, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.deepseek_vl import (
    SIGLIP_LARGE,
    DeepseekVL,
    check_processor,
    end_where_the_tokenizer_ends,
    known_beside_sam,
    to_dict_beside_sam,
)
from minivlm.processing.deepseek_vl_hybrid import DeepseekVLHybridProcessor
from minivlm.text.llama import LlamaConfig, LlamaDecoder
from minivlm.vision.deepseek_vl import HighResolutionTower, HybridAligner
from minivlm.vision.sam import SamVisionConfig
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class DeepseekVLHybridConfig:
    """A SigLIP tower, SAM's tower, a Llama. The defaults are deepseek-vl-7b."""

    vision: SiglipVisionConfig = SIGLIP_LARGE
    high_res_vision: SamVisionConfig = field(default_factory=SamVisionConfig)
    text: LlamaConfig = field(
        default_factory=lambda: LlamaConfig(
            num_hidden_layers=30, vocab_size=102400, max_position_embeddings=16384
        )
    )
    image_token_id: int = 100015
    pad_token_id: int = 100001
    bos_token_id: int = 100000
    eos_token_id: int | tuple[int, ...] = 100001

    def __post_init__(self) -> None:
        check_types(self)
        if self.text.hidden_size % 2:
            raise InputError(
                f"the decoder is {self.text.hidden_size} wide, and each tower gives half of it: choose an "
                "even width"
            )

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one picture: SigLIP's patches, each with what SAM says of the place."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a whole config.json of transformers. Raises InputError: it describes another system."""
        require_system(values, "deepseek_vl_hybrid")
        sam = SamVisionConfig.from_dict(part_of(values, "high_res_vision_config"))
        return cls(high_res_vision=sam, **known_beside_sam(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "deepseek_vl_hybrid",
            "architectures": ["DeepseekVLHybridForConditionalGeneration"],
            "high_res_vision_config": self.high_res_vision.to_dict(),
            **to_dict_beside_sam(self),
        }


class DeepseekVLHybrid(DeepseekVL):
    """The whole system."""

    config_class: ClassVar[Any] = DeepseekVLHybridConfig
    layouts: ClassVar[dict[str, Layout]] = DEEPSEEK_VL_HYBRID_LAYOUTS
    config: DeepseekVLHybridConfig  # type: ignore[assignment]  # the same fields, and one more

    def __init__(self, config: DeepseekVLHybridConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        vision, sam, width = config.vision, config.high_res_vision, config.text.hidden_size
        self.vision_tower = SiglipVisionModel(vision)
        self.high_res_tower = HighResolutionTower(sam, vision.image_size // vision.patch_size)
        self.aligner = HybridAligner(vision.hidden_size, 4 * sam.output_channels, width)
        self.language_model = LlamaDecoder(config.text)

    def encode_image(self, pixel_values: Tensor, high_res_pixel_values: Tensor | None = None) -> Tensor:
        """The same pictures twice, both [B, C, height, width] -> image features [B, N, D].

        Raises ValueError: only the small ones.
        """
        if high_res_pixel_values is None:
            raise ValueError("high_res_pixel_values are missing: this model reads every picture in two sizes")
        dtype = self.vision_tower.post_layernorm.weight.dtype
        low = self.vision_tower(pixel_values.to(dtype))
        high = self.high_res_tower(high_res_pixel_values.to(dtype))
        return self.aligner(low, high)

    def maps_of_tokens(self, maps: list[Tensor]) -> list[Tensor]:
        """Of the attention maps recorded in `encode_image`, those among the places of image tokens: SigLIP's.

        SAM's, which come after them, are among other places, window by window.
        """
        return maps[: self.config.vision.num_hidden_layers]


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[DeepseekVLHybrid, DeepseekVLHybridProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other; otherwise as in `DeepseekVL.from_pretrained`.
    """
    config = DeepseekVLHybridConfig.from_dict(values)
    processor = DeepseekVLHybridProcessor.from_pretrained(folder)
    check_both_sizes(folder, config, processor)
    model = DeepseekVLHybrid.from_folder(folder, config, dtype, device)
    end_where_the_tokenizer_ends(model, processor)
    return model, processor


def check_both_sizes(
    folder: Path, config: DeepseekVLHybridConfig, processor: DeepseekVLHybridProcessor
) -> None:
    """Raise InputError if a folder's processor does not match the config."""
    check_processor(folder, config, processor)
    side = processor.image_processor.high_res.image_size
    require_equal(folder, "the large picture's side", config.high_res_vision.image_size, side, PICTURES)
