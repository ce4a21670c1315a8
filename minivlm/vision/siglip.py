"""SigLIP's image tower (https://arxiv.org/abs/2303.15343): a Vision Transformer from pixels to image tokens.

Differences from the original ViT (https://arxiv.org/abs/2010.11929): no class token, the tanh form of GELU,
eps 1e-6, and the output is one vector per patch after a last LayerNorm. Attention is bidirectional: every
patch sees every other, so no mask is needed.

    pixels [B, C, 224, 224] -> patches [B, 196, 768] -> 12 blocks -> LayerNorm -> [B, 196, 768]
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
)
from minivlm.layers import EncoderBlock
from minivlm.vision.pixels import check_pixels


@dataclass(frozen=True)
class SiglipVisionConfig:
    """SigLIP's image tower (https://arxiv.org/abs/2303.15343). The defaults are siglip-base-patch16-224."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 16  # pixels, height = width
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        check_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of image tokens; pixels beyond the last whole patch are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipVisionConfig:
        """From the `vision_config` part of a config.json.

        Raises InputError: not SigLIP's tower, a different activation, or a pooling head.
        """
        expect(values, "vision_config", "model_type", "siglip_vision_model")
        expect(values, "vision_config", "hidden_act", "gelu_pytorch_tanh")
        expect(values, "vision_config", "vision_use_head", False)
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {
            "model_type": "siglip_vision_model",
            **asdict(self),
            "vision_use_head": False,
        }


class SiglipVisionEmbeddings(nn.Module):
    """Cuts the picture into patches, projects each to a vector, and adds a learned vector per position."""

    position_ids: Tensor

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        # Kernel = stride = patch: every patch is multiplied by the same matrix, and patches do not overlap.
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            padding="valid",
        )
        self.num_positions = config.num_patches
        self.position_embedding = nn.Embedding(self.num_positions, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=config.hidden_size**-0.5)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Create `position_ids` [1, N]. Not persistent: counted, not learned, and stored in no file."""
        # Created on the CPU: on the meta device, arange would first import PyTorch's compiler.
        ids = torch.arange(self.num_positions, device="cpu")[None].to(self.position_embedding.weight.device)
        self.register_buffer("position_ids", ids, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, N, D]."""
        grid = self.patch_embedding(pixel_values)  # [B, D, height / P, width / P]
        patches = grid.flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding(self.position_ids)


class SiglipVisionModel(nn.Module):
    """The whole tower.

    >>> model = SiglipVisionModel(SiglipVisionConfig(image_size=224, patch_size=16))
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 196, 768])

    To get its attention maps, run it inside `minivlm.attention.record_attention()`.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The patch embeddings, then each block's output: num_hidden_layers + 1 tensors [B, N, D].

        The last one comes before `post_layernorm`. An iterator: only what the caller keeps stays in memory.
        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values)
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, N, D], one vector per patch."""
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)
