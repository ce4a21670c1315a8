"""SigLIP (https://arxiv.org/abs/2303.15343): a picture and its caption meet, and every pair is judged alone.

    picture -> image tower -> pooling head        ┐
                                                  ├-> cosine, times exp(logit_scale), + logit_bias -> sigmoid
    text    -> text tower  -> last place -> linear ┘

What differs from CLIP in `clip.py`: no class token but a pooling head, no projection of the picture (the
text comes to the image tower's width), a bias in the logits, and a sigmoid. The answer to "does this text
fit?" does not depend on which other texts are asked about, and may be no to all of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.layouts import SIGLIP_LAYOUTS
from minivlm.encoder_configs import SiglipConfig
from minivlm.losses import l2_normalize, pair_logits, siglip_loss
from minivlm.models.contrastive import ContrastiveOutput, check_widths
from minivlm.text.clip import SiglipTextModel
from minivlm.vision.pooling import AttentionPoolingHead
from minivlm.vision.siglip import SiglipVisionModel


class SigLIP(nn.Module):
    """The whole system. `minivlm.load` gives one with its processor."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision_model = SiglipVisionModel(vision)
        self.head = AttentionPoolingHead(
            vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, vision.layer_norm_eps
        )
        self.text_model = SiglipTextModel(config.text)
        # Where training starts (section 3.2): most pairs are wrong, so the first guess is no.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs have to be."""
        return self.logit_scale.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, D], of any length."""
        return self.head(self.vision_model(pixel_values.to(self.logit_scale.dtype)))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right to full length -> [B, D], of any length.

        Raises ValueError: another length.
        """
        return self.text_model.pool(self.text_model(input_ids))

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """exp(logit_scale) * cosine + logit_bias. [n, D], [m, D] -> [n, m].

        Raises ValueError: unequal widths.
        """
        check_widths(image_embeds, text_embeds)
        return pair_logits(image_embeds, text_embeds, self.logit_scale, self.logit_bias)

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        """How likely each text fits, whatever the others are: [n, m] -> [n, m], rows need not sum to 1."""
        return logits_per_image.sigmoid()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, return_loss: bool = False
    ) -> ContrastiveOutput:
        """Every picture against every text.

        Args:
            input_ids: [m, T], T the full length.
            pixel_values: [n, C, height, width].
            return_loss: row i of both belongs together; n must be m.

        Raises:
            ValueError: unequal numbers of pictures and texts with return_loss; otherwise as the towers.
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
        """Load a checkpoint folder or a repo id of the Hub; dtype None keeps the file's own.

        Raises InputError: see `minivlm.checkpoints.weights`.
        """
        folder = weights.find_folder(name)
        config = SiglipConfig.from_dict(weights.read_config(folder))
        return weights.load_model(cls, config, folder, SIGLIP_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads as well."""
        weights.save_model(self, self.config.to_dict(), Path(folder), SIGLIP_LAYOUTS["hub"])
