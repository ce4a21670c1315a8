"""CLIP (https://arxiv.org/abs/2103.00020): a picture and its caption meet in one space.

    picture -> image tower -> class token -> linear ┐
                                                    ├-> cosine, times exp(logit_scale) -> softmax
    text    -> text tower  -> at the eos  -> linear ┘

The logits of one picture over several texts are a choice among exactly these texts, so their softmax is the
answer to "which of them?". SigLIP's question is another one, see `siglip.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.layouts import CLIP_LAYOUTS
from minivlm.encoder_configs import CLIPConfig
from minivlm.losses import clip_loss, l2_normalize, pair_logits
from minivlm.models.contrastive import ContrastiveOutput, check_widths
from minivlm.text.clip import CLIPTextModel
from minivlm.vision.clip import CLIPVisionModel


class CLIP(nn.Module):
    """The whole system. `minivlm.load` gives one with its processor."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionModel(config.vision)
        self.text_model = CLIPTextModel(config.text)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs have to be."""
        return self.logit_scale.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, projection_dim], of any length."""
        tokens = self.vision_model(pixel_values.to(self.logit_scale.dtype))
        return self.visual_projection(self.vision_model.pool(tokens))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], each row with an eos, padding behind it -> [B, projection_dim], of any length.

        Raises ValueError: a row without eos, or more tokens than the tower reads.
        """
        return self.text_projection(self.text_model.pool(self.text_model(input_ids), input_ids))

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """exp(logit_scale) * cosine. [n, D], [m, D] -> [n, m]. Raises ValueError: unequal widths."""
        check_widths(image_embeds, text_embeds)
        return pair_logits(image_embeds, text_embeds, self.logit_scale)

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        """How likely each text is the one that fits, of these texts: [n, m] -> [n, m], rows sum to 1."""
        return logits_per_image.softmax(dim=-1)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, return_loss: bool = False
    ) -> ContrastiveOutput:
        """Every picture against every text.

        Args:
            input_ids: [m, T].
            pixel_values: [n, C, height, width].
            return_loss: row i of both belongs together; n must be m.

        Raises:
            ValueError: unequal numbers of pictures and texts with return_loss; otherwise as the towers.
        """
        image_embeds, text_embeds = self.encode_image(pixel_values), self.encode_text(input_ids)
        logits = self.logits(image_embeds, text_embeds)
        loss = clip_loss(image_embeds, text_embeds, self.logit_scale) if return_loss else None
        return ContrastiveOutput(
            logits, logits.T, l2_normalize(image_embeds), l2_normalize(text_embeds), loss
        )

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> CLIP:
        """Load a checkpoint folder or a repo id of the Hub; dtype None keeps the file's own.

        Raises InputError: see `minivlm.checkpoints.weights`.
        """
        folder = weights.find_folder(name)
        config = CLIPConfig.from_dict(weights.read_config(folder))
        return weights.load_model(cls, config, folder, CLIP_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads as well."""
        weights.save_model(self, self.config.to_dict(), Path(folder), CLIP_LAYOUTS["hub"])
