"""The names of VisualBERT's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import siglip_tower

_BERT_BLOCK = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.o_proj": "attention.output.dense",
    "layer_norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layer_norm2": "output.LayerNorm",
}

VISUALBERT_LAYOUTS: dict[str, Layout] = {
    # What transformers writes for VisualBertForPreTraining, and a tower as in PaliGemma's files.
    "hub": [
        *siglip_tower("vision_tower.vision_model.", "vision_tower."),
        *(
            (f"visual_bert.encoder.layer.*.{file}.", f"language_model.layers.*.{ours}.")
            for ours, file in _BERT_BLOCK.items()
        ),
        ("visual_bert.embeddings.word_embeddings.", "language_model.embed_tokens."),
        ("visual_bert.embeddings.position_embeddings.", "language_model.embed_positions."),
        ("visual_bert.embeddings.token_type_embeddings.", "language_model.embed_types."),
        ("visual_bert.embeddings.LayerNorm.", "language_model.norm."),
        ("visual_bert.embeddings.visual_", "visual_"),
        ("visual_bert.pooler.dense.", "language_model.pooler."),
        ("cls.predictions.transform.dense.", "language_model.transform."),
        ("cls.predictions.transform.LayerNorm.", "language_model.transform_norm."),
        ("cls.predictions.bias", "language_model.bias"),
        ("cls.seq_relationship.", "seq_relationship."),
    ],
}
