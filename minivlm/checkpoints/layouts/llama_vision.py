"""The names of the tensors of Llama 3.2 Vision."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout


def _llama_vision(tower: str, decoder: str, head: str, projector: str) -> Layout:
    return [
        (f"{tower}patch_embedding.", "vision_tower.embeddings.patch_embedding."),
        (f"{tower}class_embedding", "vision_tower.embeddings.class_embedding"),
        (f"{tower}pre_tile_positional_embedding.", "vision_tower.embeddings.pre_tile_embedding."),
        (f"{tower}post_tile_positional_embedding.", "vision_tower.post_tile_embedding."),
        *(
            (f"{tower}gated_positional_embedding.{file}", f"vision_tower.embeddings.{ours}")
            for file, ours in {
                "gate": "position_gate",
                "embedding": "position_embedding.weight",
                "tile_embedding.": "tile_position_embedding.",
            }.items()
        ),
        (f"{tower}transformer.layers.", "vision_tower.layers."),
        (f"{tower}global_transformer.layers.", "vision_tower.global_layers."),
        (f"{tower}layernorm_", "vision_tower.layernorm_"),
        (projector, "multi_modal_projector."),
        (head, "language_model.lm_head."),
        *((f"{decoder}{part}.", f"language_model.{part}.") for part in ("embed_tokens", "layers", "norm")),
    ]


LLAMA_VISION_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, what transformers writes, and `save_pretrained`.
    "hub": _llama_vision(
        "vision_model.", "language_model.model.", "language_model.lm_head.", "multi_modal_projector."
    ),
    # The names of the modules in transformers 5: a state_dict saved as it is.
    "runtime": _llama_vision(
        "model.vision_model.", "model.language_model.", "lm_head.", "model.multi_modal_projector."
    ),
}
