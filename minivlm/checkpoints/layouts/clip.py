"""The names of CLIP's tensors, with a ViT or a ResNet for its image tower."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import Layout
from minivlm.checkpoints.layouts.parts import siglip_tower


def _resblocks(file: str, ours: str) -> Layout:
    """The blocks of CLIP's transformers in OpenAI's words, which open_clip kept."""
    block = f"{file}transformer.resblocks.*."
    return [
        (f"{block}attn.in_proj_", f"{ours}layers.*.self_attn.{{q,k,v}}_proj."),
        (f"{block}attn.out_proj.", f"{ours}layers.*.self_attn.o_proj."),
        (f"{block}ln_1.", f"{ours}layers.*.layer_norm1."),
        (f"{block}ln_2.", f"{ours}layers.*.layer_norm2."),
        (f"{block}mlp.c_fc.", f"{ours}layers.*.mlp.fc1."),
        (f"{block}mlp.c_proj.", f"{ours}layers.*.mlp.fc2."),
    ]


_OPEN_CLIP_TEXT: Layout = [
    *_resblocks("", "text_model."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight^T"),
    ("logit_scale", "logit_scale"),
]

CLIP_LAYOUTS: dict[str, Layout] = {
    "hub": [
        *siglip_tower("vision_model.", "vision_model."),
        ("vision_model.pre_layrnorm.", "vision_model.pre_layrnorm."),
        *siglip_tower("text_model.", "text_model."),
        ("text_model.final_layer_norm.", "text_model.final_layer_norm."),
        ("visual_projection.", "visual_projection."),
        ("text_projection.", "text_projection."),
        ("logit_scale", "logit_scale"),
    ],
    # Of OpenAI's own program, and of open_clip.
    "open_clip": [
        *_resblocks("visual.", "vision_model."),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("visual.proj", "visual_projection.weight^T"),
        *_OPEN_CLIP_TEXT,
    ],
}

CLIP_RESNET_LAYOUTS: dict[str, Layout] = {
    "open_clip": [
        # Stages count from 1 there and from 0 here.
        *((f"visual.layer{stage + 1}.", f"vision_model.stages.{stage}.") for stage in range(4)),
        ("visual.attnpool.positional_embedding", "vision_model.pool.position_embedding"),
        ("visual.attnpool.c_proj.", "vision_model.pool.attention.o_proj."),
        ("visual.attnpool.", "vision_model.pool.attention."),
        ("visual.", "vision_model."),  # the stem
        *_OPEN_CLIP_TEXT,
    ],
}
