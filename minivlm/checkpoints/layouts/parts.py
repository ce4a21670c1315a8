"""What several systems have in their files: towers, and a head."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import UNUSED, Layout


def siglip_tower(file: str, ours: str) -> Layout:
    """SigLIP's or CLIP's tower as transformers has it, or a text tower of either."""
    return [
        # SigLIP files say out_proj where Gemma files say o_proj. Here both are one class.
        (f"{file}encoder.layers.*.self_attn.out_proj.", f"{ours}layers.*.self_attn.o_proj."),
        (f"{file}encoder.layers.*.", f"{ours}layers.*."),
        (f"{file}embeddings.", f"{ours}embeddings."),
        (f"{file}post_layernorm.", f"{ours}post_layernorm."),
    ]


def timm_tower(file: str, ours: str) -> Layout:
    """SigLIP's tower as timm has it. Its pooling head came with the weights and is not read."""
    block = f"{file}blocks.*."
    return [
        (f"{file}pos_embed", f"{ours}embeddings.position_embedding.weight[0]"),
        (f"{file}patch_embed.proj.", f"{ours}embeddings.patch_embedding."),
        (f"{block}attn.qkv.", f"{ours}layers.*.self_attn.{{q,k,v}}_proj."),
        (f"{block}attn.proj.", f"{ours}layers.*.self_attn.o_proj."),
        (f"{block}norm", f"{ours}layers.*.layer_norm"),
        (f"{block}mlp.", f"{ours}layers.*.mlp."),
        (f"{file}norm.", f"{ours}post_layernorm."),
        (f"{file}attn_pool.", UNUSED),
    ]


# Only a model whose head is not tied to the embedding table has a head in its file. Both names occur.
HEAD_OLD: Layout = [
    ("language_model.lm_head.", "language_model.lm_head."),
    ("lm_head.", "language_model.lm_head."),
]
HEAD_NEW: Layout = HEAD_OLD[::-1]
