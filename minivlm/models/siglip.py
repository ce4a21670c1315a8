"""SigLIP (https://arxiv.org/abs/2303.15343): pictures and captions in one space, each pair judged on its own.

    picture -> image tower -> pooling head            ┐
                                                      ├-> cosine * exp(logit_scale) + logit_bias -> sigmoid
    text    -> text tower  -> last position -> linear ┘

Differences from CLIP in `clip.py`: a pooling head instead of a class token, no projection of the picture (the
text is projected to the image tower's width), a bias in the logits, and a sigmoid. The answer to "does this
text fit?" does not depend on the other texts, and may be no for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import PICTURES, check_vocabulary, find_folder, read_config, require_equal
from minivlm.checkpoints.layouts import SIGLIP_LAYOUTS
from minivlm.configs import (
    check_types,
    expect,
    part_of,
    require_system,
)
from minivlm.errors import InputError
from minivlm.losses import l2_normalize, pair_logits, siglip_loss
from minivlm.models.contrastive import ContrastiveOutput, check_widths
from minivlm.processing import PairProcessor
from minivlm.text.siglip import SiglipTextConfig, SiglipTextModel
from minivlm.vision.pooling import AttentionPoolingHead
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class SiglipConfig:
    """Two towers whose shared space is as wide as the image tower.

    Raises InputError: the text tower's output has a different width.
    """

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: SiglipTextConfig = field(default_factory=SiglipTextConfig)

    def __post_init__(self) -> None:
        check_types(self)
        if self.text.output_size != self.vision.hidden_size:
            raise InputError(
                f"the image tower returns {self.vision.hidden_size} numbers and the text tower "
                f"{self.text.output_size}: set the text's projection_size to the image tower's hidden_size"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "siglip")
        vision = dict(part_of(values, "vision_config"))
        expect(vision, "vision_config", "vision_use_head", True)
        vision.pop("vision_use_head", None)  # the head belongs to the model, not to the tower
        return cls(
            vision=SiglipVisionConfig.from_dict(vision),
            text=SiglipTextConfig.from_dict(part_of(values, "text_config")),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "vision_config": self.vision.to_dict() | {"vision_use_head": True},
            "text_config": self.text.to_dict(),
        }


class SigLIP(nn.Module):
    """The whole system. `minivlm.load` returns one with its processor."""

    has_class_token = False  # the pooling head's one query makes the picture's vector

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision_model = SiglipVisionModel(vision)
        self.head = AttentionPoolingHead(
            vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, vision.layer_norm_eps
        )
        self.text_model = SiglipTextModel(config.text)
        # Initial values (section 3.2): most pairs do not match, so the first guess is no.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.logit_scale.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, D], not normalized."""
        return self.head(self.vision_model(pixel_values.to(self.logit_scale.dtype)))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right to full length -> [B, D], not normalized.

        Raises ValueError: the texts do not have full length.
        """
        return self.text_model.pool(self.text_model(input_ids))

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """exp(logit_scale) * cosine + logit_bias. [n, D], [m, D] -> [n, m].

        Raises ValueError: different widths.
        """
        check_widths(image_embeds, text_embeds)
        return pair_logits(image_embeds, text_embeds, self.logit_scale, self.logit_bias)

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        """How likely each text fits, whatever the others are: [n, m] -> [n, m]; rows need not sum to 1."""
        return logits_per_image.sigmoid()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, return_loss: bool = False
    ) -> ContrastiveOutput:
        """Every picture against every text.

        Args:
            input_ids: [m, T], padded to full length.
            pixel_values: [n, C, height, width].
            return_loss: add the loss of matching picture i with text i; n must equal m.

        Raises:
            ValueError: return_loss with different numbers of pictures and texts; otherwise as the towers.
        """
        image_embeds, text_embeds = self.encode_image(pixel_values), self.encode_text(input_ids)
        logits = self.logits(image_embeds, text_embeds)
        loss = None
        if return_loss:
            loss = siglip_loss(image_embeds, text_embeds, self.logit_scale, self.logit_bias)
        return ContrastiveOutput(
            logits, logits.T, l2_normalize(image_embeds), l2_normalize(text_embeds), loss
        )

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> SigLIP:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = SiglipConfig.from_dict(read_config(folder))
        return weights.load_model(cls, config, folder, SIGLIP_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), SIGLIP_LAYOUTS["hub"])


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[SigLIP, PairProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other; otherwise as in `SigLIP.from_pretrained`.
    """
    config = SiglipConfig.from_dict(values)
    processor = PairProcessor.from_pretrained(folder, "siglip", config.text.max_position_embeddings)
    side = processor.image_processor.image_size
    require_equal(folder, "the picture's side", config.vision.image_size, side, PICTURES)
    check_vocabulary(folder, config.text.vocab_size, processor.tokenizer.backend.get_vocab().values())
    return weights.load_model(SigLIP, config, folder, SIGLIP_LAYOUTS, dtype=dtype, device=device), processor
