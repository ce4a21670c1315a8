"""The original Vision Transformer (https://arxiv.org/abs/2010.11929) with one of its two heads.

- A classifier: one linear layer on the class token, as in the models fine-tuned on ImageNet.
- A pooler: tanh of a linear layer on the class token, where pre-training had its classifier. Some published
  folders omit it, and then the model has no head at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import PICTURES, find_folder, read_config, require_equal
from minivlm.checkpoints.layouts import VIT_LAYOUTS
from minivlm.processing import ViTImageProcessor
from minivlm.vision.vit import VisionTransformer, ViTConfig


@dataclass
class ViTOutput:
    """Tokens [B, 1 + N, D]; pooler_output [B, D] or logits [B, classes], depending on the head."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    logits: Tensor | None = None
    loss: Tensor | None = None


class ViT(nn.Module):
    """The whole system. `minivlm.load` returns one with its image processor."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        self.classifier = nn.Linear(config.hidden_size, len(config.labels)) if config.labels else None

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.vision_model.layernorm.weight.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The class token after the last norm: pixel_values [B, C, height, width] -> [B, D]."""
        return self.forward(pixel_values).last_hidden_state[:, 0]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ViTOutput:
        """All tokens, and the head's output for the class token.

        Args:
            pixel_values: [B, C, height, width].
            labels: [B], the class index of each picture; the loss is then the mean cross-entropy.

        Raises:
            ValueError: labels for a model without a classifier, or not one per picture.
        """
        if labels is not None and self.classifier is None:
            raise ValueError(
                "labels were given, but this ViT has no classifier: load one fine-tuned for classification"
            )
        if labels is not None and labels.shape != (len(pixel_values),):
            raise ValueError(
                f"{len(pixel_values)} pictures and labels of shape {list(labels.shape)}: give one per picture"
            )
        tokens = self.vision_model(pixel_values.to(self.vision_model.layernorm.weight.dtype))
        first = tokens[:, 0]
        pooled = None if self.pooler is None else self.pooler(first).tanh()
        logits = None if self.classifier is None else self.classifier(first)
        loss = None
        if labels is not None and logits is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return ViTOutput(tokens, pooled, logits, loss)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> ViT:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = _with_pooler_of_file(folder, ViTConfig.from_dict(read_config(folder)))
        return weights.load_model(cls, config, folder, VIT_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        layout = VIT_LAYOUTS["hub" if self.config.labels else "hub without classifier"]
        weights.save_model(self, self.config.to_dict(), Path(folder), layout)


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[ViT, ViTImageProcessor]:
    """Load the model and image processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other; otherwise as in `ViT.from_pretrained`.
    """
    config = ViTConfig.from_dict(values)
    processor = ViTImageProcessor.from_pretrained(folder)
    require_equal(folder, "the picture's side", config.image_size, processor.image_size, PICTURES)
    config = _with_pooler_of_file(folder, config)
    return weights.load_model(ViT, config, folder, VIT_LAYOUTS, dtype=dtype, device=device), processor


def _with_pooler_of_file(folder: Path, config: ViTConfig) -> ViTConfig:
    """The config, without a pooler if the file has none: config.json does not say."""
    names = weights.read_tensors(folder)
    has_pooler = any(".pooler." in f".{name}" for name in names)
    return replace(config, pooler=config.pooler and has_pooler)
