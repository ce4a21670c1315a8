"""How checkpoint files name their tensors, as tables.

The same PaliGemma exists under four sets of names, depending on which version of transformers wrote it, the
same ViT under four, CLIP and SigLIP under one. A layout is a list of rows: how a name begins in the file, and
how it begins in our modules. `*` stands for a layer number. The first row that matches is used, in both
directions, so more specific rows come first.
"""

from __future__ import annotations

import re

Layout = list[tuple[str, str]]


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


def to_ours(name: str, layout: Layout) -> str | None:
    """Our name for a tensor in a file, or None if no row of the layout matches.

    >>> to_ours("language_model.model.norm.weight", PALIGEMMA_LAYOUTS["hub"])
    'language_model.norm.weight'
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
        match = re.match(re.escape(old).replace(r"\*", r"(\d+)"), name)
        if match:
            return new.replace("*", match[1] if match.groups() else "*") + name[match.end() :]
    return None
