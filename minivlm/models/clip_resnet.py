"""CLIP with its convolutional image tower: RN50, RN101, RN50x4, x16, x64 (https://arxiv.org/abs/2103.00020).

    picture -> ResNet -> attention over its places ┐
                                                   ├-> cosine, times exp(logit_scale) -> softmax
    text    -> text tower -> at the eos -> linear  ┘

Differences from CLIP in `clip.py`: the picture's vector needs no projection, because the last linear layer of
the attention that pools the places has the width of the shared space. transformers has no such model, so
folders are those of open_clip, see `open_clip.py`.

A loaded model is in evaluation mode, and has to stay there, in training as well: its batch norms then use the
statistics of the file, and a picture's vector does not depend on its neighbors in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import OPEN_CLIP, find_folder, read_json
from minivlm.checkpoints.layouts import CLIP_RESNET_LAYOUTS
from minivlm.configs import check_types, open_clip_parts, part_of
from minivlm.models.clip import CLIPBase
from minivlm.processing import CLIPImageProcessor
from minivlm.text.clip import CLIPTextConfig, CLIPTextModel
from minivlm.vision.clip_resnet import CLIPResNet, CLIPResNetConfig


@dataclass(frozen=True)
class ResNetCLIPConfig:
    """Two towers, which share the space of the image tower's `projection_dim`."""

    vision: CLIPResNetConfig = field(default_factory=CLIPResNetConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    logit_scale_init_value: float = 2.6592  # ln(1 / 0.07)

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any]) -> ResNetCLIPConfig:
        """From the `model_cfg` part of an open_clip_config.json.

        Raises InputError: it describes another system.
        """
        parts, hidden_act = open_clip_parts(values)
        return cls(
            vision=CLIPResNetConfig.from_open_clip(parts["vision_cfg"], parts["embed_dim"]),
            text=CLIPTextConfig.from_open_clip(parts["text_cfg"], hidden_act),
        )

    def to_dict(self) -> dict[str, Any]:
        """An open_clip_config.json that this package and open_clip both read."""
        return {
            "model_cfg": {
                "embed_dim": self.vision.projection_dim,
                "quick_gelu": self.text.hidden_act == "quick_gelu",
                "vision_cfg": self.vision.to_open_clip(),
                "text_cfg": self.text.to_open_clip(),
            },
            "preprocess_cfg": CLIPImageProcessor().to_open_clip(),
        }


class ResNetCLIP(CLIPBase):
    """The whole system. `minivlm.load` returns one with its processor."""

    has_class_token = True  # the mean of all places takes its part in the pooling

    def __init__(self, config: ResNetCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = CLIPResNet(config.vision)
        self.text_model = CLIPTextModel(config.text)
        self.text_projection = nn.Linear(config.text.hidden_size, config.vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, projection_dim], not normalized."""
        return self.vision_model(pixel_values.to(self.logit_scale.dtype))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> ResNetCLIP:
        """Load a local folder or a repo of the Hub, with open_clip's files; dtype None keeps the file's.

        Raises InputError: see `minivlm.checkpoints`.
        """
        config_file, file = OPEN_CLIP
        folder = find_folder(name, files=OPEN_CLIP)
        config = ResNetCLIPConfig.from_open_clip(part_of(read_json(folder, config_file), "model_cfg"))
        return weights.load_model(
            cls, config, folder, CLIP_RESNET_LAYOUTS, dtype=dtype, device=device, file=file
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write open_clip_config.json and open_clip_model.safetensors, which open_clip loads too."""
        layout = CLIP_RESNET_LAYOUTS["open_clip"]
        weights.save_model(self, self.config.to_dict(), Path(folder), layout, OPEN_CLIP)
