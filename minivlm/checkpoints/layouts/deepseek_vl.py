"""The names of DeepSeek-VL's tensors, with one image tower or with two."""

from __future__ import annotations

from minivlm.checkpoints.layouts.names import UNUSED, Layout
from minivlm.checkpoints.layouts.parts import siglip_tower, timm_tower


def _sam(file: str, ours: str) -> Layout:
    """SAM's tower without its neck, in the words of its own program; transformers kept those in a block."""
    return [
        (f"{file}attn.qkv.", f"{ours}self_attn.{{q,k,v}}_proj."),
        (f"{file}attn.proj.", f"{ours}self_attn.o_proj."),
        (f"{file}attn.rel_pos_", f"{ours}self_attn.rel_pos_"),
        (f"{file}mlp.lin", f"{ours}mlp.fc"),
    ]


def _deepseek_vl(tower: str, with_sam: bool) -> Layout:
    """As transformers names its modules; `tower` is what SigLIP's names begin with."""
    file, ours = "model.high_res_vision_model.vision_encoder.", "high_res_tower.sam."
    sam = [
        *_sam(f"{file}layers.*.", f"{ours}layers.*."),
        (f"{file}layers.*.layer_norm", f"{ours}layers.*.layer_norm"),
        (f"{file}patch_embed.projection.", f"{ours}patch_embedding."),
        (f"{file}pos_embed", f"{ours}position_embedding"),
        (f"{file}neck.", f"{ours}neck."),
        ("model.high_res_vision_neck.", "high_res_tower.early_neck."),
        ("model.high_res_vision_proj.conv", "high_res_tower.downsample"),
        ("model.high_res_vision_alpha", "high_res_tower.alpha"),
        ("model.aligner.vision_proj.", "aligner.low."),
        ("model.aligner.high_res_vision_proj.", "aligner.high."),
    ]
    return [
        *(sam if with_sam else []),
        *siglip_tower(tower, "vision_tower."),
        ("model.aligner.", "aligner."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model."),
    ]


def _necks(file: str, ours: str) -> Layout:
    parts = enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))
    return [(f"{file}.{number}.", f"{ours}.{part}.") for number, part in parts]


def _deepseek_decoder() -> Layout:
    return [
        ("language_model.lm_head.", "language_model.lm_head."),
        ("language_model.model.", "language_model."),
    ]


_HIGH, _OUR_HIGH = "vision_model.vision_tower_high.vision_tower.", "high_res_tower."

DEEPSEEK_VL_LAYOUTS: dict[str, Layout] = {
    # What transformers writes, and `save_pretrained`; then what was converted by an older version.
    "hub": _deepseek_vl("model.vision_model.", with_sam=False),
    "older": _deepseek_vl("model.vision_model.vision_model.", with_sam=False),
    # Of the original program.
    "original": [
        *timm_tower("vision_model.vision_tower.", "vision_tower."),
        ("aligner.layers.0.", "aligner.linear1."),
        ("aligner.layers.2.", "aligner.linear2."),
        *_deepseek_decoder(),
    ],
}

DEEPSEEK_VL_HYBRID_LAYOUTS: dict[str, Layout] = {
    "hub": _deepseek_vl("model.vision_model.", with_sam=True),
    "older": _deepseek_vl("model.vision_model.vision_model.", with_sam=True),
    "original": [
        *timm_tower("vision_model.vision_tower_low.vision_tower.", "vision_tower."),
        *_sam(f"{_HIGH}blocks.*.", f"{_OUR_HIGH}sam.layers.*."),
        (f"{_HIGH}blocks.*.norm", f"{_OUR_HIGH}sam.layers.*.layer_norm"),
        (f"{_HIGH}patch_embed.proj.", f"{_OUR_HIGH}sam.patch_embedding."),
        (f"{_HIGH}pos_embed", f"{_OUR_HIGH}sam.position_embedding"),
        *_necks(f"{_HIGH}neck", f"{_OUR_HIGH}sam.neck"),
        *_necks(f"{_HIGH}neck_hd", f"{_OUR_HIGH}early_neck"),
        (f"{_HIGH}downsamples.0.", f"{_OUR_HIGH}downsample1."),
        (f"{_HIGH}downsamples.1.", f"{_OUR_HIGH}downsample2."),
        (f"{_HIGH}hd_alpha_downsamples", f"{_OUR_HIGH}alpha"),
        ("vision_model.high_layer_norm.", UNUSED),
        ("vision_model.low_layer_norm.", UNUSED),
        ("aligner.low_up_proj.", "aligner.low."),
        ("aligner.high_up_proj.", "aligner.high."),
        ("aligner.layers.1.", "aligner.proj."),
        *_deepseek_decoder(),
    ],
}
