"""CLIP's other image tower: a ResNet with attention pooling (https://arxiv.org/abs/2103.00020, section 2.4).

Five of the image towers that CLIP compared are convolutional (RN50, RN101, RN50x4, x16, x64). Differences
from the ResNet that ImageNet knows (https://arxiv.org/abs/1512.03385):

- The stem is three small convolutions instead of one of 7 x 7, and pools by the mean, not the maximum.
- No convolution skips pixels after the stem: wherever the picture shrinks, a mean over 2 x 2 comes first, so
  that no pixel goes unread. The shortcut shrinks the same way.
- The picture's vector is no mean over places but attention: the mean is the query, and looks at all places.

A batch norm keeps running statistics, which belong to the weights: a tower that is left in training mode
normalizes each picture by its batch, and is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention
from minivlm.configs import check_types, known_alone
from minivlm.errors import InputError
from minivlm.vision.pixels import check_pixels

EXPANSION = 4  # a block ends this many times as wide as its 3 x 3 convolution
SHRINKS = 32  # height and width: twice in the stem, twice more in each of three stages


@dataclass(frozen=True)
class CLIPResNetConfig:
    """CLIP's convolutional towers. The defaults are RN50. OpenAI's files have no config, see `from_state`."""

    layers: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    width: int = 64  # channels after the stem
    image_size: int = 224  # pixels, height = width
    projection_dim: int = 1024
    num_channels: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.layers) != 4 or min(self.layers) < 1 or self.width % 2 or self.image_size % SHRINKS:
            raise InputError(
                f"a tower of {self.layers} blocks, width {self.width} and pictures of {self.image_size} "
                f"pixels cannot be built: expected four stages, an even width and a multiple of {SHRINKS} "
                "pixels"
            )

    @property
    def hidden_size(self) -> int:
        """Channels after the last stage."""
        return self.width * 8 * EXPANSION

    @property
    def num_attention_heads(self) -> int:
        """Heads of the pooling, 64 numbers each where the published widths are used."""
        return self.width // 2

    @property
    def num_patches(self) -> int:
        """Places that are left for the pooling to look at."""
        return (self.image_size // SHRINKS) ** 2

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any], projection_dim: int) -> CLIPResNetConfig:
        """From the `vision_cfg` part of an open_clip_config.json.

        Raises InputError: the part asks for something else than CLIP's tower.
        """
        sizes = {"layers": None, "width": 64, "image_size": 224}
        found = known_alone("vision_cfg", values, sizes, {"head_width": 64, "mlp_ratio": 4.0})
        return cls(tuple(found["layers"]), found["width"], found["image_size"], projection_dim)

    def to_open_clip(self) -> dict[str, Any]:
        """The `vision_cfg` part of an open_clip_config.json."""
        return {
            "image_size": self.image_size,
            "layers": list(self.layers),
            "width": self.width,
            "patch_size": None,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], prefix: str = "visual.") -> CLIPResNetConfig:
        """The sizes of a tower, from its tensors in OpenAI's names.

        Raises InputError: tensors of such a tower are missing.
        """
        try:
            blocks = tuple(
                len({name.split(".")[2] for name in state if name.startswith(f"{prefix}layer{stage}.")})
                for stage in range(1, 5)
            )
            places, projection = (
                state[f"{prefix}attnpool.{name}"] for name in ("positional_embedding", "c_proj.weight")
            )
            side = round((len(places) - 1) ** 0.5)
            width = state[f"{prefix}layer1.0.conv1.weight"].shape[0]
        except (KeyError, IndexError) as error:
            raise InputError(
                f"the file has no convolutional tower of CLIP under {prefix!r}: {error} is missing"
            ) from error
        return cls(blocks, width, SHRINKS * side, projection.shape[0])


def convolution(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width; its bias would be undone by the norm that follows."""
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1 x 1 to few channels, 3 x 3 among them, 1 x 1 back to many, beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = width * EXPANSION
        self.conv1, self.bn1 = convolution(before, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, after, 1), nn.BatchNorm2d(after)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(convolution(before, after, 1), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, height, width] -> [B, 4 width, height / stride, width / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.shrink(out)))
        shortcut = x if self.downsample is None else self.downsample(self.shrink(x))
        return F.relu(out + shortcut)


class AttentionPool(nn.Module):
    """One query, the mean of all places, looks at the mean and at all places; all of them have positions."""

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__()
        D, heads = config.hidden_size, config.num_attention_heads
        self.position_embedding = nn.Parameter(torch.randn(config.num_patches + 1, D) * D**-0.5)
        self.attention = Attention(D, heads, bias=True)
        self.attention.o_proj = nn.Linear(D, config.projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D, height, width] -> [B, projection_dim]."""
        places = x.flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.position_embedding
        return self.attention(tokens)[:, 0]


class CLIPResNet(nn.Module):
    """The whole tower.

    >>> model = CLIPResNet(CLIPResNetConfig()).eval()
    >>> model(torch.randn(1, 3, 224, 224)).shape
    torch.Size([1, 1024])
    """

    def __init__(self, config: CLIPResNetConfig) -> None:
        super().__init__()
        self.config = config
        half, width = config.width // 2, config.width
        self.conv1, self.bn1 = convolution(config.num_channels, half, 3, stride=2), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = convolution(half, half, 3), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = convolution(half, width, 3), nn.BatchNorm2d(width)
        stages, before = [], width
        for number, blocks in enumerate(config.layers):
            wide = width * 2**number
            first = Bottleneck(before, wide, stride=1 if number == 0 else 2)
            before = wide * EXPANSION
            stages.append(nn.Sequential(first, *(Bottleneck(before, wide, 1) for _ in range(blocks - 1))))
        self.stages = nn.ModuleList(stages)
        self.pool = AttentionPool(config)

    @property
    def place_size(self) -> int:
        """Pixels of the picture for each place that is left for the pooling, height = width."""
        return SHRINKS

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized as CLIP's -> [B, projection_dim], not normalized.

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in self.stages:
            x = stage(x)
        return self.pool(x)
