"""The names of SigLIP's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import siglip_tower

SIGLIP_LAYOUTS: dict[str, Layout] = {
    "hub": [
        ("vision_model.head.", "head."),  # here a part of the model, since PaliGemma's tower has none
        *siglip_tower("vision_model.", "vision_model."),
        *siglip_tower("text_model.", "text_model."),
        ("text_model.final_layer_norm.", "text_model.final_layer_norm."),
        ("text_model.head.", "text_model.head."),
        ("logit_scale", "logit_scale"),
        ("logit_bias", "logit_bias"),
    ],
}
