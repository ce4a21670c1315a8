"""Llama 3.2 Vision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivlm.checkpoints.layouts import LLAMA_VISION_LAYOUTS
from minivlm.models.llama_vision import LlamaVision, LlamaVisionConfig
from minivlm.processing import CanvasImageProcessor, Llama3Tokenizer, LlamaVisionProcessor
from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.llama3_tokens import BEGIN, END, HEADER, HEADER_END, IMAGE, PAD, TURN_END
from minivlm.processing.qwen2_tokens import PIECES as QWEN2_PIECES
from minivlm.text.llama3_rope import Llama3Scaling
from published.family import Family
from published.words import byte_form, with_byte_words

# With the gates, which would otherwise be nearly closed: a folder of whose pictures nothing is seen.
ONES = ("norm.weight", "layernorm_pre.weight", "layernorm_post.weight", "gate", "gate_attn", "gate_ffn")
PIECES = QWEN2_PIECES.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # up to three digits
RESERVED = 256  # tokens behind the words that control the model, most of which nobody uses
NAMED = {0: BEGIN, 1: END, 4: PAD, 5: "<|step_id|>", 6: HEADER, 7: HEADER_END}
NAMED |= {8: "<|eom_id|>", 9: TURN_END, 10: "<|python_tag|>"}


def _published() -> dict[str, LlamaVisionConfig]:
    base = LlamaVisionConfig()
    base = replace(base, text=replace(base.text, rope_scaling=Llama3Scaling()))
    instruct = replace(base, vision=replace(base.vision, image_size=560))
    return {
        "llama-3.2-11b-vision": replace(base, eos_token_id=128001),
        "llama-3.2-11b-vision-instruct": instruct,
    }


PUBLISHED = _published()


def config_json(config: LlamaVisionConfig) -> dict[str, Any]:
    """Written before transformers had rope_parameters."""
    values = config.to_dict()
    rope = values["text_config"].pop("rope_parameters")
    theta = rope.pop("rope_theta")
    values["text_config"] |= {"rope_theta": theta}
    if config.text.rope_scaling is not None:
        values["text_config"] |= {"rope_scaling": rope}
    return values


def write_processor(config: LlamaVisionConfig, folder: Path) -> None:
    """Tokenizer, preprocessor and the form of a chat."""
    pictures = CanvasImageProcessor(
        image_size=config.vision.image_size,
        image_mean=CLIPImageProcessor.image_mean,
        image_std=CLIPImageProcessor.image_std,
        max_image_tiles=config.vision.max_num_tiles,
    )
    tokenizer = Llama3Tokenizer(make_tokenizer(config.bos_token_id))
    LlamaVisionProcessor(tokenizer, pictures).save_pretrained(folder)


def make_tokenizer(count: int) -> tokenizers.Tokenizer:
    """A tokenizer in Llama 3's form: so many words, what controls the model, and <|image|> as its last id."""
    backend = with_byte_words(byte_form(PIECES, ignore_merges=True), count)
    others = (f"<|reserved_special_token_{number}|>" for number in range(RESERVED))
    names = [NAMED.get(place) or next(others) for place in range(RESERVED)]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*names, IMAGE)])
    return backend


LLAMA_VISION = Family(LlamaVision, LLAMA_VISION_LAYOUTS["hub"], ONES, write_processor, config_json)
