"""The names of PaliGemma's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import HEAD_NEW, HEAD_OLD, siglip_tower

PALIGEMMA_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, and what `save_pretrained` writes.
    "hub": [
        *siglip_tower("vision_tower.vision_model.", "vision_tower."),
        ("multi_modal_projector.linear.", "multi_modal_projector."),
        *HEAD_OLD,
        ("language_model.model.", "language_model."),
    ],
    # transformers 5 writes this for a model that was never loaded from the Hub.
    "fresh": [
        *siglip_tower("vision_tower.", "vision_tower."),
        ("multi_modal_projector.linear.", "multi_modal_projector."),
        *HEAD_OLD,
        ("language_model.model.", "language_model."),
    ],
    # Some fine-tunes saved by transformers from 4.52 on.
    "finetune": [
        *siglip_tower("model.vision_tower.vision_model.", "vision_tower."),
        ("model.multi_modal_projector.linear.", "multi_modal_projector."),
        *HEAD_NEW,
        ("model.language_model.", "language_model."),
    ],
    # The names of the modules in transformers 5: a state_dict saved as it is.
    "runtime": [
        *siglip_tower("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.linear.", "multi_modal_projector."),
        *HEAD_NEW,
        ("model.language_model.", "language_model."),
    ],
}
