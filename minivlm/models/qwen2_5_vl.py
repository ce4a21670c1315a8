"""Qwen2.5-VL (https://arxiv.org/abs/2502.13923): windows in the tower, and time in seconds.

What differs from Qwen2-VL, on which it stands: the tower (vision/qwen2_5_vl.py), and what a position in time
means. There, the steps of a video are counted, so a clip that is sampled half as often seems twice as fast.
Here, a second is `tokens_per_second` positions long, however many frames were taken in it:

    seconds                 0    0.5    1    1.5    2
    2 frames a second, at   0           2           4    a step of two frames lasts a second
    4 frames a second, at   0     1     2     3     4    a step lasts half a second (`second_per_grid_ts`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.configs import check_types, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.qwen2_vl import (
    Qwen2VL,
    check_processor,
    check_widths,
    ids_to_dict,
    known_beside_the_tower,
)
from minivlm.processing import Qwen2_5_VLProcessor
from minivlm.text.qwen2 import Qwen2Config
from minivlm.vision.qwen2_5_vl import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel


@dataclass(frozen=True)
class Qwen2_5_VLConfig:
    """A tower and a decoder of one width. The defaults are Qwen2.5-VL-3B."""

    vision: Qwen2_5_VLVisionConfig = field(
        default_factory=lambda: Qwen2_5_VLVisionConfig(
            hidden_size=1280, out_hidden_size=2048, tokens_per_second=2
        )
    )
    text: Qwen2Config = field(
        default_factory=lambda: Qwen2Config(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            max_position_embeddings=128000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        )
    )
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151645

    def __post_init__(self) -> None:
        check_types(self)
        check_widths(self.vision.out_hidden_size, self.text.hidden_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2_5_VLConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "qwen2_5_vl")
        vision = Qwen2_5_VLVisionConfig.from_dict(part_of(values, "vision_config"))
        return cls(vision=vision, **known_beside_the_tower(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            **self.text.to_dict(),  # in published files, not in a part of its own
            **ids_to_dict(self),
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vision_config": self.vision.to_dict(),
        }


class Qwen2_5_VL(Qwen2VL):
    """The whole system: Qwen2-VL with another tower and another clock."""

    config_class = Qwen2_5_VLConfig
    tower_class = Qwen2_5_VLVisionModel
    config: Qwen2_5_VLConfig  # type: ignore[assignment]

    def intervals(self, grid_thw: Tensor, second_per_grid_ts: Tensor | None) -> Tensor:
        """Positions from one step of a video to the next, [M]: as many as pass in the time between them.

        Raises InputError: the time is not given for each video.
        """
        if second_per_grid_ts is None or len(second_per_grid_ts) != len(grid_thw):
            given = "is missing" if second_per_grid_ts is None else f"has {len(second_per_grid_ts)} numbers"
            raise InputError(
                f"second_per_grid_ts {given}, and there are {len(grid_thw)} videos: say for each how many "
                "seconds lie between two of its steps, or let the processor do so"
            )
        return second_per_grid_ts.to(torch.float32) * self.config.vision.tokens_per_second


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[Qwen2_5_VL, Qwen2_5_VLProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other; otherwise as in `Qwen2_5_VL.from_pretrained`.
    """
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    check_processor(folder, Qwen2_5_VLConfig.from_dict(values), processor)
    return Qwen2_5_VL.from_pretrained(folder, dtype, device), processor
