"""How checkpoint files name their tensors, as tables.

The same PaliGemma exists under four sets of names, depending on which version of transformers wrote it, the
same ViT under four, CLIP under two, SigLIP under one. A layout is a list of rows: how a name begins in the
file, and how it begins in our modules. The first row that matches is used, in both directions, so more
specific rows come first. Signs in a row:

    *           a layer number
    {q,k,v}     on our side: the file has these tensors in one, each below the one before it
    {q,k,v|16}  the same in sixteen rounds, as of heads: a sixteenth of each, then the next of each
    ^T          on our side, after a whole name: the file has the transpose
    [0]         the same: the file has it as the only one of a batch
    UNUSED      on our side: tensors that a published file holds and its own program never reads
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Layout = list[tuple[str, str]]
TRANSPOSED, BATCHED = "^T", "[0]"
UNUSED = "-"


def _siglip(file: str, ours: str) -> Layout:
    return [
        # SigLIP files say out_proj where Gemma files say o_proj. Here both are one class.
        (f"{file}encoder.layers.*.self_attn.out_proj.", f"{ours}layers.*.self_attn.o_proj."),
        (f"{file}encoder.layers.*.", f"{ours}layers.*."),
        (f"{file}embeddings.", f"{ours}embeddings."),
        (f"{file}post_layernorm.", f"{ours}post_layernorm."),
    ]


# Only a model whose head is not tied to the embedding table has a head in its file. Both names occur.
_HEAD_OLD = [("language_model.lm_head.", "language_model.lm_head."), ("lm_head.", "language_model.lm_head.")]
_HEAD_NEW = _HEAD_OLD[::-1]

PALIGEMMA_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, and what `save_pretrained` writes.
    "hub": [
        *_siglip("vision_tower.vision_model.", "vision_tower."),
        ("multi_modal_projector.linear.", "multi_modal_projector."),
        *_HEAD_OLD,
        ("language_model.model.", "language_model."),
    ],
    # transformers 5 writes this for a model that was never loaded from the Hub.
    "fresh": [
        *_siglip("vision_tower.", "vision_tower."),
        ("multi_modal_projector.linear.", "multi_modal_projector."),
        *_HEAD_OLD,
        ("language_model.model.", "language_model."),
    ],
    # Some fine-tunes saved by transformers from 4.52 on.
    "finetune": [
        *_siglip("model.vision_tower.vision_model.", "vision_tower."),
        ("model.multi_modal_projector.linear.", "multi_modal_projector."),
        *_HEAD_NEW,
        ("model.language_model.", "language_model."),
    ],
    # The names of the modules in transformers 5: a state_dict saved as it is.
    "runtime": [
        *_siglip("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.linear.", "multi_modal_projector."),
        *_HEAD_NEW,
        ("model.language_model.", "language_model."),
    ],
}


def _llava(tower: str, projector: str, head: Layout, decoder: str) -> Layout:
    return [
        *_siglip(tower, "vision_tower."),
        (f"{tower}pre_layrnorm.", "vision_tower.pre_layrnorm."),
        (projector, "multi_modal_projector."),
        *head,
        (decoder, "language_model."),
    ]


LLAVA_LAYOUTS: dict[str, Layout] = {
    # What the published checkpoints use, and what `save_pretrained` writes.
    "hub": _llava("vision_tower.vision_model.", "multi_modal_projector.", _HEAD_OLD, "language_model.model."),
    # As for PaliGemma: "fresh" is a model that was never loaded from the Hub, "runtime" a state_dict.
    "fresh": _llava("vision_tower.", "multi_modal_projector.", _HEAD_OLD, "language_model.model."),
    "finetune": _llava(
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        _HEAD_NEW,
        "model.language_model.",
    ),
    "runtime": _llava(
        "model.vision_tower.", "model.multi_modal_projector.", _HEAD_NEW, "model.language_model."
    ),
}


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
        *_siglip("vision_model.", "vision_model."),
        ("vision_model.pre_layrnorm.", "vision_model.pre_layrnorm."),
        *_siglip("text_model.", "text_model."),
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

SIGLIP_LAYOUTS: dict[str, Layout] = {
    "hub": [
        ("vision_model.head.", "head."),  # here a part of the model, since PaliGemma's tower has none
        *_siglip("vision_model.", "vision_model."),
        *_siglip("text_model.", "text_model."),
        ("text_model.final_layer_norm.", "text_model.final_layer_norm."),
        ("text_model.head.", "text_model.head."),
        ("logit_scale", "logit_scale"),
        ("logit_bias", "logit_bias"),
    ],
}


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
        *_siglip("vision_tower.vision_model.", "vision_tower."),
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
        *_siglip(tower, "vision_tower."),
        ("model.aligner.", "aligner."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model."),
    ]


def _timm(file: str, ours: str) -> Layout:
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
        *_timm("vision_model.vision_tower.", "vision_tower."),
        ("aligner.layers.0.", "aligner.linear1."),
        ("aligner.layers.2.", "aligner.linear2."),
        *_deepseek_decoder(),
    ],
}

DEEPSEEK_VL_HYBRID_LAYOUTS: dict[str, Layout] = {
    "hub": _deepseek_vl("model.vision_model.", with_sam=True),
    "older": _deepseek_vl("model.vision_model.vision_model.", with_sam=True),
    "original": [
        *_timm("vision_model.vision_tower_low.vision_tower.", "vision_tower."),
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


DEEPSEEK_VL2_LAYOUTS: dict[str, Layout] = {
    # Of the original program, which the published checkpoints use, and `save_pretrained`.
    "hub": [
        *_timm("vision.", "vision_tower."),
        ("projector.layers.0.", "projector.linear1."),
        ("projector.layers.2.", "projector.linear2."),
        ("image_newline", "image_newline"),
        ("view_seperator", "view_separator"),
        ("language.lm_head.", "language_model.lm_head."),
        ("language.model.", "language_model."),
    ],
}


def to_ours(name: str, layout: Layout) -> str | None:
    """Our name for a tensor in a file, or None if no row of the layout matches; signs are for `split`.

    >>> to_ours("language_model.model.norm.weight", PALIGEMMA_LAYOUTS["hub"])
    'language_model.norm.weight'
    >>> to_ours("transformer.resblocks.3.attn.in_proj_bias", CLIP_LAYOUTS["open_clip"])
    'text_model.layers.3.self_attn.{q,k,v}_proj.bias'
    """
    return _rename(name, layout)


def to_file(name: str, layout: Layout) -> str:
    """The other way around. Raises KeyError if no row of the layout matches."""
    renamed = _rename(name, [(ours, file) for file, ours in layout])
    if renamed is None:
        raise KeyError(f"no row of the layout matches {name!r}")
    return renamed


def _rename(name: str, rows: Layout) -> str | None:
    for old, new in rows:
        match = re.match(_pattern(old), name)
        if match:
            return new.replace("*", match[1] if match.groups() else "*") + name[match.end() :]
    return None


def _without_signs(row: str) -> str:
    return row.removesuffix(TRANSPOSED).removesuffix(BATCHED)


def _pattern(row: str) -> str:
    """What a name has to begin with."""
    whole = _without_signs(row)
    pattern = re.escape(whole).replace(r"\*", r"(\d+)")
    for choice in re.findall(r"\{.+?\}", whole):
        names, _ = _choices(choice[1:-1])
        pattern = pattern.replace(re.escape(choice), f"(?:{'|'.join(names)})")
    return pattern


def _choices(inside: str) -> tuple[list[str], int]:
    """What stands between braces: names, and in how many rounds their tensors are packed."""
    names, _, rounds = inside.partition("|")
    return names.split(","), int(rounds or 1)


def names_in(ours: str) -> list[str]:
    """What `to_ours` returned as the names of single tensors: "a.{q,k}.b" is a.q.b and a.k.b."""
    before, brace, rest = _without_signs(ours).partition("{")
    if not brace:
        return [before]
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in _choices(choices)[0]]


def _rounds(ours: str) -> int:
    """In how many rounds the tensors of a name are packed."""
    _, _, rest = ours.partition("{")
    return _choices(rest.partition("}")[0])[1]


def split(tensor: Tensor, ours: str) -> list[Tensor]:
    """A tensor of a file -> those of `names_in(ours)`.

    They share its memory unless they are transposed or packed in several rounds.
    """
    plain = tensor.mT.contiguous() if ours.endswith(TRANSPOSED) else tensor
    plain = plain[0] if ours.endswith(BATCHED) else plain
    parts, rounds = len(names_in(ours)), _rounds(ours)
    if parts == 1:
        return [plain]
    if rounds == 1:
        return list(plain.tensor_split(parts))
    return list(plain.unflatten(0, (rounds, parts, -1)).transpose(0, 1).flatten(1, 2))


def join(tensors: Sequence[Tensor], ours: str) -> Tensor:
    """The other way around."""
    rounds = _rounds(ours)
    if rounds > 1:
        return torch.stack([tensor.unflatten(0, (rounds, -1)) for tensor in tensors], dim=1).flatten(0, 2)
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    joined = joined[None] if ours.endswith(BATCHED) else joined
    return joined.mT if ours.endswith(TRANSPOSED) else joined


def as_in_file(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state_dict with the names and shapes of a file. Raises KeyError: as `to_file`."""
    tensors: dict[str, Tensor] = {}
    for name in state:
        file = to_file(name, layout)
        if file not in tensors:
            ours = to_ours(file, layout)
            assert ours is not None
            tensors[file] = join([state[part] for part in names_in(ours)], ours)
    return tensors
