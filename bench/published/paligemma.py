"""PaliGemma and PaliGemma 2."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivlm import PaliGemma, PaliGemmaConfig, Processor, SiglipVisionConfig
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS
from minivlm.models.sizes import DECODERS, IMAGE_SIZES, paligemma2_config
from minivlm.processing import ImageProcessor, Tokenizer, build_tokenizer
from minivlm.processing.tokens import IMAGE, LOC_TOKENS, SEG_TOKENS
from published.family import Family, without
from published.words import longer_words

# Gemma's RMSNorm multiplies by 1 + weight, so its weights are around 0.
SIGLIP_NORMS = ("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")


def _published() -> dict[str, PaliGemmaConfig]:
    first = PaliGemmaConfig()
    configs: dict[str, PaliGemmaConfig] = {}
    for kind, sizes in (("pt", IMAGE_SIZES), ("mix", IMAGE_SIZES[:2])):
        for size in sizes:
            vision = replace(first.vision, image_size=size)
            configs[f"paligemma-3b-{kind}-{size}"] = replace(first, vision=vision)
            for width in DECODERS:
                configs[f"paligemma2-{width}-{kind}-{size}"] = paligemma2_config(width, size)
    return configs


PUBLISHED = _published()


def config_json(config: PaliGemmaConfig) -> dict[str, Any]:
    """The files of PaliGemma 2 say more about the decoder than those of the first."""
    values = config.to_dict()
    del values["tie_word_embeddings"]
    known = SiglipVisionConfig().to_dict()
    vision = ("image_size", "num_channels", "layer_norm_eps", "hidden_act")
    values["vision_config"] = without(values["vision_config"], known, vision)
    if values["text_config"]["model_type"] == "gemma":
        known = PaliGemmaConfig().text.to_dict()
        text = ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters")
        text += ("hidden_activation", "tie_word_embeddings")
        values["text_config"] = without(values["text_config"], known, text)
    return values


def write_processor(config: PaliGemmaConfig, folder: Path) -> None:
    """Tokenizer and preprocessor."""
    size, patches = config.vision.image_size, config.vision.num_patches
    pictures = ImageProcessor(image_size=size, image_seq_length=patches)
    Processor(Tokenizer(make_tokenizer(config.image_token_id)), pictures).save_pretrained(folder)


def make_tokenizer(image_token_id: int) -> tokenizers.Tokenizer:
    """A tokenizer in Gemma's form: words, then <loc>, <seg>, and <image> as its last id."""
    state = json.loads(build_tokenizer([]).to_str())
    count = image_token_id - len(LOC_TOKENS) - len(SEG_TOKENS)
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = dict.fromkeys([*state["model"]["vocab"], "▁", "\n", *characters])  # ordered, no doubles
    if count < len(words):
        raise ValueError(f"image_token_id {image_token_id} leaves {count} words, expected {len(words)}")
    merges = []
    for start, letters in itertools.islice(longer_words("▁"), count - len(words)):
        merges.append([start, letters])
        words[start + letters] = None
    state["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    state["model"]["merges"] = merges
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 4]  # <pad> to <unk>
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([*LOC_TOKENS, *SEG_TOKENS])
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return backend


PALIGEMMA = Family(PaliGemma, PALIGEMMA_LAYOUTS["hub"], SIGLIP_NORMS, write_processor, config_json)
