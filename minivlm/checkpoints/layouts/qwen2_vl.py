"""The names of the tensors of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout


def _qwen2_vl(tower: str, decoder: str) -> Layout:
    """Qwen2-VL and Qwen2.5-VL: the names of their towers differ only inside the MLP, where ours do, too."""
    block = f"{tower}blocks.*."
    return [
        (f"{tower}patch_embed.proj.", "vision_tower.embeddings.patch_embedding."),
        (f"{block}norm", "vision_tower.layers.*.layer_norm"),
        (f"{block}attn.qkv.", "vision_tower.layers.*.self_attn.{q,k,v}_proj."),
        (f"{block}attn.proj.", "vision_tower.layers.*.self_attn.o_proj."),
        (f"{block}mlp.", "vision_tower.layers.*.mlp."),
        (f"{tower}merger.ln_q.", "vision_tower.merger.norm."),
        (f"{tower}merger.mlp.0.", "vision_tower.merger.fc1."),
        (f"{tower}merger.mlp.2.", "vision_tower.merger.fc2."),
        ("lm_head.", "language_model.lm_head."),
        *((f"{decoder}{part}.", f"language_model.{part}.") for part in ("embed_tokens", "layers", "norm")),
    ]


QWEN2_VL_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, what transformers writes, and `save_pretrained`.
    "hub": _qwen2_vl("visual.", "model."),
    # The names of the modules in transformers 5: a state_dict saved as it is.
    "runtime": _qwen2_vl("model.visual.", "model.language_model."),
}
