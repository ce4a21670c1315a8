"""CLIP's image tower (https://arxiv.org/abs/2103.00020, section 2.4).

Differences from SigLIP's tower in `siglip.py`: a learned class token before the patches, no bias in the patch
projection, an extra LayerNorm before the first block (`pre_layrnorm`, spelled this way in all checkpoints),
QuickGELU, and eps 1e-5. The last LayerNorm is applied only to the class token, which becomes the picture's
vector; the patches are returned as they leave the last block. Models that read the patches, such as LLaVA,
take them from one of the `hidden_states`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.configs import (
    check_activation,
    check_grid,
    check_types,
    check_width,
    expect,
    known,
    known_alone,
)
from minivlm.layers import EncoderBlock
from minivlm.vision.pixels import check_pixels

# What open_clip takes for sizes that a config does not name. Patches are dropped only in training.
OPEN_CLIP_SIZES = {
    "image_size": 224, "patch_size": 16, "width": 768, "head_width": 64, "layers": 12, "mlp_ratio": 4.0,
    "patch_dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIP's image tower (https://arxiv.org/abs/2103.00020). The defaults are clip-vit-base-patch32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 32  # pixels, height = width
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        check_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches in a picture. The tower has one more token, the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """From the `vision_config` part of a config.json. Raises InputError: not CLIP's tower."""
        expect(values, "vision_config", "model_type", "clip_vision_model")
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {"model_type": "clip_vision_model", **asdict(self)}

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any], hidden_act: str) -> CLIPVisionConfig:
        """From the `vision_cfg` part of an open_clip_config.json.

        Raises InputError: the part asks for something else than CLIP's tower.
        """
        fixed = {"pool_type": "tok", "pos_embed_type": "learnable"}
        found = known_alone("vision_cfg", values, OPEN_CLIP_SIZES, fixed)
        return cls(
            hidden_size=found["width"],
            intermediate_size=int(found["width"] * found["mlp_ratio"]),
            num_hidden_layers=found["layers"],
            num_attention_heads=found["width"] // max(1, found["head_width"]),
            image_size=found["image_size"],
            patch_size=found["patch_size"],
            hidden_act=hidden_act,
        )


class CLIPVisionEmbeddings(nn.Module):
    """The class token, then one vector per patch, plus a learned vector per position."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,  # the LayerNorm that follows has one
        )
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=config.hidden_size**-0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, 1 + N, D]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, D]
        first = self.class_embedding.expand(len(patches), 1, -1)  # [B, 1, D]
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVisionModel(nn.Module):
    """The whole tower.

    >>> model = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=32))
    >>> tokens = model(torch.randn(1, 3, 224, 224))
    >>> tokens.shape, model.pool(tokens).shape
    (torch.Size([1, 50, 768]), torch.Size([1, 768]))
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The embeddings after `pre_layrnorm`, then each block's output: all [B, 1 + N, D].

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, 1 + N, D], before the last norm."""
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.layers:
            x = layer(x)
        return x

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token after the last norm: [B, 1 + N, D] -> [B, D]."""
        return self.post_layernorm(tokens[:, 0])
