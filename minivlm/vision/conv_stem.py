"""The first stages of a ResNet, in place of a tower (https://arxiv.org/abs/2108.10904, section 3.2).

A Vision Transformer multiplies each patch by one matrix. Here a patch comes from convolutions that overlap,
and so knows its neighbors before attention begins. What differs from CLIP's ResNet, whose blocks are used:
the first layer is one convolution, the last stage and the pooling are missing, and each place gets a learned
position. There is no attention, so there are no maps to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.configs import check_grid, check_types, known
from minivlm.errors import InputError
from minivlm.vision.clip_resnet import EXPANSION, Bottleneck, convolution
from minivlm.vision.pixels import check_pixels


@dataclass(frozen=True)
class ConvStemConfig:
    """Three stages of a ResNet. The defaults are those of ResNet-101."""

    layers: tuple[int, ...] = (3, 4, 23)  # blocks of each stage
    width: int = 64  # channels after the first convolution
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 16  # pixels from one place to the next; 8 leaves out the first pooling

    def __post_init__(self) -> None:
        check_types(self)
        check_grid(self.image_size, self.patch_size)
        if len(self.layers) != 3 or min(self.layers) < 1 or self.patch_size not in (8, 16):
            raise InputError(
                f"a stem of {self.layers} blocks and patches of {self.patch_size} pixels cannot be built: "
                "expected three stages, and 8 or 16 pixels"
            )
        if self.image_size % 2:
            raise InputError(f"image_size {self.image_size} is odd: the first convolution halves it")

    @property
    def hidden_size(self) -> int:
        """Channels after the last stage."""
        return self.width * 4 * EXPANSION

    @property
    def num_patches(self) -> int:
        """Places that are left; pixels beyond the last whole patch are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvStemConfig:
        """From the `vision_config` part of a config.json."""
        found = known(cls, values)
        if isinstance(found.get("layers"), list):
            found["layers"] = tuple(found["layers"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {"model_type": "conv_stem", **asdict(self)}


class ConvStemEmbeddings(nn.Module):
    """The first convolution, and the positions of what comes out at the end."""

    def __init__(self, config: ConvStemConfig) -> None:
        super().__init__()
        self.patch_embedding = convolution(config.num_channels, config.width, 3, stride=2)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


class ConvStem(nn.Module):
    """The whole stem.

    >>> model = ConvStem(ConvStemConfig()).eval()
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 196, 1024])
    """

    def __init__(self, config: ConvStemConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ConvStemEmbeddings(config)
        self.norm = nn.BatchNorm2d(config.width)
        stages, before = [], config.width
        for number, blocks in enumerate(config.layers):
            wide = config.width * 2**number
            first = Bottleneck(before, wide, stride=1 if number == 0 else 2)
            before = wide * EXPANSION
            stages.append(nn.Sequential(first, *(Bottleneck(before, wide, 1) for _ in range(blocks - 1))))
        self.stages = nn.ModuleList(stages)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, N, D], one vector per place.

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = F.relu(self.norm(self.embeddings.patch_embedding(pixel_values)))
        x = F.avg_pool2d(x, self.config.patch_size // 8)
        for stage in self.stages:
            x = stage(x)
        return x.flatten(2).transpose(1, 2) + self.embeddings.position_embedding.weight
