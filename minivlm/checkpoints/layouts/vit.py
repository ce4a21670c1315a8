"""The names of ViT's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout


def _vit(tower: str, block: str, parts: dict[str, str]) -> Layout:
    """`tower` prefixes everything but the classifier, `block` everything inside a block."""
    return [
        *((f"{tower}{block}{file}.", f"vision_model.layers.*.{ours}.") for ours, file in parts.items()),
        (f"{tower}embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
        (f"{tower}embeddings.", "vision_model.embeddings."),
        (f"{tower}layernorm.", "vision_model.layernorm."),
        (f"{tower}pooler.dense.", "pooler."),
        ("classifier.", "classifier."),
    ]


_VIT_NORMS = {"layer_norm1": "layernorm_before", "layer_norm2": "layernorm_after"}
_VIT_HUB = {
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    **_VIT_NORMS,
}
_VIT_RUNTIME = {"self_attn": "attention", "mlp": "mlp", **_VIT_NORMS}

VIT_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use and transformers 5 writes.
    "hub": _vit("vit.", "encoder.layer.*.", _VIT_HUB),
    "hub without classifier": _vit("", "encoder.layer.*.", _VIT_HUB),
    # The names of the modules in transformers 5: a state_dict saved as it is.
    "runtime": _vit("vit.", "layers.*.", _VIT_RUNTIME),
    "runtime without classifier": _vit("", "layers.*.", _VIT_RUNTIME),
}
