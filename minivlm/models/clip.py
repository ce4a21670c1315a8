"""CLIP (https://arxiv.org/abs/2103.00020): pictures and captions in one space.

    picture -> image tower -> class token -> linear ┐
                                                    ├-> cosine, times exp(logit_scale) -> softmax
    text    -> text tower  -> at the eos  -> linear ┘

One picture's logits over several texts are a choice among exactly these texts: their softmax answers "which
of them?". SigLIP asks a different question, see `siglip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import (
    PICTURES,
    TOKENIZER,
    check_vocabulary,
    find_folder,
    read_config,
    require_equal,
)
from minivlm.checkpoints.layouts import CLIP_LAYOUTS
from minivlm.configs import (
    check_types,
    known_numbers,
    open_clip_parts,
    part_of,
    require_system,
)
from minivlm.losses import clip_loss, l2_normalize, pair_logits
from minivlm.models.contrastive import ContrastiveOutput, check_widths
from minivlm.processing import PairProcessor
from minivlm.text.clip import CLIPTextConfig, CLIPTextModel
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and the width of the space that they share."""

    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # ln(1 / 0.07)

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """From a whole config.json. Raises InputError: it describes another system.

        A tower's own `projection_dim` is for using that tower alone and is ignored. In old files,
        `text_config_dict` or `vision_config_dict` overrides the part without `_dict`.
        """
        require_system(values, "clip")
        return cls(
            vision=CLIPVisionConfig.from_dict(part_of(values, "vision_config")),
            text=CLIPTextConfig.from_dict(part_of(values, "text_config")),
            **known_numbers(values, "projection_dim", "logit_scale_init_value"),
        )

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """From the `model_cfg` part of an open_clip_config.json.

        Raises InputError: it describes another system.
        """
        parts, hidden_act = open_clip_parts(values)
        return cls(
            vision=CLIPVisionConfig.from_open_clip(parts["vision_cfg"], hidden_act),
            text=CLIPTextConfig.from_open_clip(parts["text_cfg"], hidden_act),
            projection_dim=parts["embed_dim"],
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        width = {"projection_dim": self.projection_dim}
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "vision_config": self.vision.to_dict() | width,
            "text_config": self.text.to_dict() | width,
            "logit_scale_init_value": self.logit_scale_init_value,
            **width,
        }


class CLIPBase(nn.Module):
    """What CLIP is with any image tower: the text tower, the cosine, and the softmax over texts."""

    text_model: CLIPTextModel
    text_projection: nn.Linear
    logit_scale: nn.Parameter

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.logit_scale.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, projection_dim], not normalized."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], each row with an eos before its padding -> [B, projection_dim], not normalized.

        Raises ValueError: a row without an eos, or with more tokens than the tower reads.
        """
        return self.text_projection(self.text_model.pool(self.text_model(input_ids), input_ids))

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """exp(logit_scale) * cosine. [n, D], [m, D] -> [n, m]. Raises ValueError: different widths."""
        check_widths(image_embeds, text_embeds)
        return pair_logits(image_embeds, text_embeds, self.logit_scale)

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        """How likely each text is the one that fits, among these: [n, m] -> [n, m]; rows sum to 1."""
        return logits_per_image.softmax(dim=-1)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, return_loss: bool = False
    ) -> ContrastiveOutput:
        """Every picture against every text.

        Args:
            input_ids: [m, T].
            pixel_values: [n, C, height, width].
            return_loss: add the loss of matching picture i with text i; n must equal m.

        Raises:
            ValueError: return_loss with different numbers of pictures and texts; otherwise as the towers.
        """
        image_embeds, text_embeds = self.encode_image(pixel_values), self.encode_text(input_ids)
        logits = self.logits(image_embeds, text_embeds)
        loss = clip_loss(image_embeds, text_embeds, self.logit_scale) if return_loss else None
        return ContrastiveOutput(
            logits, logits.T, l2_normalize(image_embeds), l2_normalize(text_embeds), loss
        )


class CLIP(CLIPBase):
    """The whole system. `minivlm.load` returns one with its processor."""

    has_class_token = True  # the first token of the image tower, and what the picture's vector is made from

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionModel(config.vision)
        self.text_model = CLIPTextModel(config.text)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, projection_dim], not normalized."""
        tokens = self.vision_model(pixel_values.to(self.logit_scale.dtype))
        return self.visual_projection(self.vision_model.pool(tokens))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> CLIP:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = CLIPConfig.from_dict(read_config(folder))
        return weights.load_model(cls, config, folder, CLIP_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), CLIP_LAYOUTS["hub"])


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[CLIP, PairProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other; otherwise as in `CLIP.from_pretrained`.
    """
    config = CLIPConfig.from_dict(values)
    processor = PairProcessor.from_pretrained(folder, "clip", config.text.max_position_embeddings)
    side = processor.image_processor.image_size
    require_equal(folder, "the picture's side", config.vision.image_size, side, PICTURES)
    eos_id = processor.tokenizer.eos_id
    if config.text.eos_token_id == 2:  # by mistake, see `CLIPTextConfig`
        config = replace(config, text=replace(config.text, eos_token_id=eos_id))
    require_equal(folder, "the id of the end", config.text.eos_token_id, eos_id, TOKENIZER)
    check_vocabulary(folder, config.text.vocab_size, processor.tokenizer.backend.get_vocab().values())
    return weights.load_model(CLIP, config, folder, CLIP_LAYOUTS, dtype=dtype, device=device), processor
