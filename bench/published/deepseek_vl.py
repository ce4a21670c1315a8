"""DeepSeek-VL with one tower, in transformers' layout (https://huggingface.co/deepseek-community)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivlm.checkpoints.layouts import DEEPSEEK_VL_LAYOUTS
from minivlm.models.deepseek_vl import DeepseekVL, DeepseekVLConfig
from minivlm.processing import DeepseekTokenizer, DeepseekVLImageProcessor, DeepseekVLProcessor
from minivlm.processing.deepseek_tokens import BEGIN, END, IMAGE
from published.family import Family
from published.words import byte_form, with_byte_words

NORMS = ("norm.weight", "layer_norm1.weight", "layer_norm2.weight")
HALF = (0.5, 0.5, 0.5)
PIECES = r"[\r\n]|\s?\p{L}+|\s?[!-/:-~]+|\s+$|\p{N}"
# Signs of the 13 bytes that no text in UTF-8 has. They are no words, and stand behind the end token.
NEVER = ("ø", "ö", "ú", "ÿ", "õ", "÷", "û", "ý", "À", "ù", "Á", "þ", "ü")

PUBLISHED = {"deepseek-vl-1.3b": DeepseekVLConfig()}


def config_json(config: DeepseekVLConfig) -> dict[str, Any]:
    """Written before transformers had rope_parameters."""
    values = config.to_dict()
    del values["text_config"]["rope_parameters"]
    return values


def write_processor(config: DeepseekVLConfig, folder: Path) -> None:
    """Tokenizer, preprocessor and the form of a chat."""
    pictures = DeepseekVLImageProcessor(image_size=config.vision.image_size, image_mean=HALF, image_std=HALF)
    tokenizer = DeepseekTokenizer(make_tokenizer(config.bos_token_id))
    DeepseekVLProcessor(tokenizer, pictures, config.num_image_tokens).save_pretrained(folder)


def make_tokenizer(count: int) -> tokenizers.Tokenizer:
    """A tokenizer in DeepSeek's form: so many words, start, end, `NEVER`, and what stands for pictures."""
    backend = with_byte_words(byte_form(PIECES), count, never=NEVER)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (BEGIN, END)])
    backend.add_tokens(list(NEVER))
    backend.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    return backend


DEEPSEEK_VL = Family(DeepseekVL, DEEPSEEK_VL_LAYOUTS["hub"], NORMS, write_processor, config_json)
