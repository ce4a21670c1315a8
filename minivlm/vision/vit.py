"""The original Vision Transformer (https://arxiv.org/abs/2010.11929), trained to tell classes apart.

What differs from CLIP's tower in `clip.py`: the patch projection has a bias, there is no norm before the
first block, the exact GELU, eps 1e-12, and the last LayerNorm is applied to every token. What differs from
SigLIP's tower in `siglip.py`: the class token, which has a place of its own in the table of positions. The
head above the class token (pooler or classifier) is in `minivlm.models.vit`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minivlm.encoder_blocks import ActivatedBlock
from minivlm.encoder_configs import ViTConfig
from minivlm.vision.clip import check_pixels


class ViTEmbeddings(nn.Module):
    """One vector per patch behind the class token, plus a learned vector per position."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(
            torch.randn(1, config.num_patches + 1, config.hidden_size) * 0.02
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, 1 + N, D]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, D]
        first = self.cls_token.expand(len(patches), -1, -1)  # [B, 1, D]
        return torch.cat([first, patches], dim=1) + self.position_embeddings


class VisionTransformer(nn.Module):
    """The whole tower.

    >>> model = VisionTransformer(ViTConfig(image_size=224, patch_size=16))
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 197, 768])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config)
        self.layers = nn.ModuleList(
            ActivatedBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.layer_norm_eps,
                config.hidden_act,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The embeddings, then the output of each block, before the last norm: each [B, 1 + N, D].

        Raises ValueError when the pictures do not have the size and channels of the config.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values)
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, 1 + N, D]; the class token is the first."""
        for x in self.hidden_states(pixel_values):
            last = x
        return self.layernorm(last)
