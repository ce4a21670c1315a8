"""The names of DeepSeek-VL2's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import timm_tower

DEEPSEEK_VL2_LAYOUTS: dict[str, Layout] = {
    # Of the original program, which the published checkpoints use, and `save_pretrained`.
    "hub": [
        *timm_tower("vision.", "vision_tower."),
        ("projector.layers.0.", "projector.linear1."),
        ("projector.layers.2.", "projector.linear2."),
        ("image_newline", "image_newline"),
        ("view_seperator", "view_separator"),
        ("language.lm_head.", "language_model.lm_head."),
        ("language.model.", "language_model."),
    ],
}
