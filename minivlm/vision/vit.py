"""The original Vision Transformer (https://arxiv.org/abs/2010.11929), trained for classification.

Differences from CLIP's tower in `clip.py`: the patch projection has a bias, there is no norm before the
first block, GELU is exact and eps is 1e-12, both as in transformers (the authors' own code, vit_jax, has
the tanh GELU), and the last LayerNorm is applied to every token. Difference from SigLIP's tower in
`siglip.py`: a class token, which has its own row in the position table. The head on the class token (pooler
or classifier) is in `minivlm.models.vit`.
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
    require_system,
)
from minivlm.errors import InputError
from minivlm.layers import EncoderBlock
from minivlm.vision.pixels import check_pixels


@dataclass(frozen=True)
class ViTConfig:
    """The original Vision Transformer (https://arxiv.org/abs/2010.11929), by default vit-base-patch16-224.

    `labels` are the class names in order. Without labels, the model has no classifier and may have a pooler
    instead.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 16  # pixels, height = width
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pooler: bool = True
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        check_grid(self.image_size, self.patch_size)
        if self.pooler and self.labels:
            raise InputError("a ViT has a pooler or a classifier, not both: with labels, set pooler=False")

    @property
    def num_patches(self) -> int:
        """Patches in a picture. The tower has one more token, the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """From a whole config.json, whose `architectures` say whether there is a classifier.

        Raises InputError: a different system, or an option that is not supported here.
        """
        require_system(values, "vit")
        expect(values, "config.json", "qkv_bias", True)
        expect(values, "config.json", "pooler_act", "tanh")
        found = known(cls, values)
        if values.get("pooler_output_size") is not None:
            width = found.get("hidden_size", cls.hidden_size)
            expect(values, "config.json", "pooler_output_size", width)
        architectures = values.get("architectures")
        classifies = isinstance(architectures, list) and "ViTForImageClassification" in architectures
        labels = _labels(values) if classifies else ()
        return cls(**found | {"labels": labels, "pooler": not labels})

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        values = {"model_type": "vit", **asdict(self), "qkv_bias": True}
        del values["labels"], values["pooler"]
        if not self.labels:
            return {**values, "architectures": ["ViTModel"]}
        return {
            **values,
            "architectures": ["ViTForImageClassification"],
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }


class ViTEmbeddings(nn.Module):
    """The class token, then one vector per patch, plus a learned vector per position."""

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
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The embeddings, then each block's output, before the last norm: all [B, 1 + N, D].

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values)
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, 1 + N, D]; the class token comes first."""
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.embeddings(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return self.layernorm(x)


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names in order; made up as in transformers if the file has none."""
    names = values.get("id2label")
    if names is None:
        count = values.get("num_labels") or 2
        if not isinstance(count, int) or not 0 < count <= 2**24:
            raise InputError(
                f"num_labels is {count!r}, expected a whole number: check the model's config.json"
            )
        return tuple(f"LABEL_{number}" for number in range(count))
    try:
        by_number = {int(number): str(label) for number, label in names.items()}
    except (AttributeError, ValueError):
        by_number = {}
    if not by_number or sorted(by_number) != list(range(len(by_number))):
        raise InputError("id2label in config.json does not number its classes 0, 1, 2...: download it again")
    return tuple(by_number[number] for number in range(len(by_number)))
