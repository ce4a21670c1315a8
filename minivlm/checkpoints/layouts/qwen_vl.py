"""The names of Qwen-VL's tensors."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout


def qwen_vl_layouts(tower_heads: int) -> dict[str, Layout]:
    """Qwen-VL's own names, which packs the tower's queries, keys and values head by head."""
    visual, block = "transformer.visual.", "transformer.visual.transformer.resblocks.*."
    ours = "vision_tower.layers.*."
    return {
        "hub": [
            (f"{block}attn.in_proj.", f"{ours}self_attn.{{q,k,v|{tower_heads}}}_proj."),
            (f"{block}attn.out_proj.", f"{ours}self_attn.o_proj."),
            (f"{block}ln_1.", f"{ours}layer_norm1."),
            (f"{block}ln_2.", f"{ours}layer_norm2."),
            (f"{block}mlp.c_fc.", f"{ours}mlp.fc1."),
            (f"{block}mlp.c_proj.", f"{ours}mlp.fc2."),
            (f"{visual}conv1.", "vision_tower.embeddings.patch_embedding."),
            (f"{visual}positional_embedding", "vision_tower.embeddings.position_embedding.weight"),
            (f"{visual}ln_pre.", "vision_tower.pre_layernorm."),
            (f"{visual}attn_pool.attn.in_proj_", "resampler.attention.{q,k,v}_proj."),
            (f"{visual}attn_pool.attn.out_proj.", "resampler.attention.o_proj."),
            (f"{visual}ln_post.", "resampler.ln_post."),
            (f"{visual}proj", "resampler.proj.weight^T"),
            (f"{visual}attn_pool.", "resampler."),
            ("transformer.h.*.attn.c_attn.", "language_model.layers.*.self_attn.{q,k,v}_proj."),
            ("transformer.h.*.attn.c_proj.", "language_model.layers.*.self_attn.o_proj."),
            ("transformer.h.*.ln_1.", "language_model.layers.*.input_layernorm."),
            ("transformer.h.*.ln_2.", "language_model.layers.*.post_attention_layernorm."),
            ("transformer.h.*.mlp.w1.", "language_model.layers.*.mlp.up_proj."),
            ("transformer.h.*.mlp.w2.", "language_model.layers.*.mlp.gate_proj."),
            ("transformer.h.*.mlp.c_proj.", "language_model.layers.*.mlp.down_proj."),
            ("transformer.wte.", "language_model.embed_tokens."),
            ("transformer.ln_f.", "language_model.norm."),
            ("lm_head.", "language_model.lm_head."),
        ],
    }
