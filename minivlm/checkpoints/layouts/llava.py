"""The names of LLaVA's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import HEAD_NEW, HEAD_OLD, siglip_tower


def _llava(tower: str, projector: str, head: Layout, decoder: str) -> Layout:
    return [
        *siglip_tower(tower, "vision_tower."),
        (f"{tower}pre_layrnorm.", "vision_tower.pre_layrnorm."),
        (projector, "multi_modal_projector."),
        *head,
        (decoder, "language_model."),
    ]


LLAVA_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, and what `save_pretrained` writes.
    "hub": _llava("vision_tower.vision_model.", "multi_modal_projector.", HEAD_OLD, "language_model.model."),
    # As for PaliGemma: "fresh" is a model that was never loaded from the Hub, "runtime" a state_dict.
    "fresh": _llava("vision_tower.", "multi_modal_projector.", HEAD_OLD, "language_model.model."),
    "finetune": _llava(
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        HEAD_NEW,
        "model.language_model.",
    ),
    "runtime": _llava(
        "model.vision_tower.", "model.multi_modal_projector.", HEAD_NEW, "model.language_model."
    ),
}
