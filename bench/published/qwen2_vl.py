"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivlm.checkpoints.layouts import QWEN2_VL_LAYOUTS
from minivlm.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig
from minivlm.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from minivlm.processing import (
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    qwen2_tokens,
)
from published.family import Family
from published.words import with_byte_words

NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "ln_q.weight")
# After the words, in the order of their ids. No model reads <|vision_pad|>.
ADDED = (
    *qwen2_tokens.CONTROLS[:3],
    *qwen2_tokens.MARKS,
    *qwen2_tokens.CONTROLS[3:5],
    "<|vision_pad|>",
    *qwen2_tokens.CONTROLS[5:],
)


def _qwen2_vl_2b() -> Qwen2VLConfig:
    large = Qwen2VLConfig()
    text = replace(
        large.text,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    return replace(large, vision=replace(large.vision, hidden_size=1536), text=text)


PUBLISHED: dict[str, Qwen2VLConfig | Qwen2_5_VLConfig] = {
    "qwen2-vl-2b": _qwen2_vl_2b(),
    "qwen2-vl-7b": Qwen2VLConfig(),
    "qwen2.5-vl-3b": Qwen2_5_VLConfig(),
}


def config_json(config: Qwen2VLConfig | Qwen2_5_VLConfig) -> dict[str, Any]:
    """Written before transformers had rope_parameters."""
    values = config.to_dict()
    rope = values.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    del values["vision_config"]["in_channels"]
    return values | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def write_processor(config: Qwen2VLConfig | Qwen2_5_VLConfig, folder: Path) -> None:
    """Tokenizer and preprocessor."""
    processor = Qwen2VLProcessor if isinstance(config, Qwen2VLConfig) else Qwen2_5_VLProcessor
    tokenizer = Qwen2Tokenizer(make_tokenizer(config.bos_token_id))
    pictures = Qwen2VLImageProcessor(patch_size=config.vision.patch_size)
    processor(tokenizer, pictures).save_pretrained(folder)


def make_tokenizer(count: int) -> tokenizers.Tokenizer:
    """A tokenizer in Qwen2's form: so many words, then what controls the model."""
    backend = with_byte_words(qwen2_tokens.build_qwen2_tokenizer([]), count)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return backend


QWEN2_VL = Family(Qwen2VL, QWEN2_VL_LAYOUTS["hub"], NORMS, write_processor, config_json)
QWEN2_5_VL = QWEN2_VL._replace(model=Qwen2_5_VL)
