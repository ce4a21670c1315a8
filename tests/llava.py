"""A tiny LLaVA with a tokenizer and a processor, in a folder that transformers has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoders import VISION
from helpers import randomize
from llama_backends import Kind, llama_backend, write_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers import LlavaConfig as ReferenceConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from minivlm.processing.chat import chat_template

SIDE, PATCH = VISION["image_size"], VISION["patch_size"]
SIGLIP = {  # changes, for a tower without a class token
    "vision": SiglipVisionConfig(**VISION, vision_use_head=False),
    "vision_feature_select_strategy": "full",
}
QUESTIONS = ["what is it?", "what color is the circle?", "what?"]


def reference_llava(seed: int = 0, **changes: Any) -> LlavaForConditionalGeneration:
    """A model of transformers with random weights, for the vocabulary of `llama_backend`."""
    words = llama_backend().get_vocab()
    text = {
        "vocab_size": len(words) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "pad_token_id": words["<pad>"],
    }
    config = ReferenceConfig(
        vision_config=changes.pop("vision", CLIPVisionConfig(**VISION)),
        text_config=LlamaConfig(**text | changes.pop("text", {})),
        image_token_index=words["<image>"],
        **changes,
    )
    return randomize(LlavaForConditionalGeneration(config), seed)


def write_llava(folder: Path, kind: Kind = "published", seed: int = 0, **changes: Any) -> Path:
    """The whole folder."""
    model = reference_llava(seed, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder, kind)
    side = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, do_pad=kind == "today"),
        AutoTokenizer.from_pretrained(folder),
        patch_size=PATCH,
        vision_feature_select_strategy=changes.get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=int(model.config.vision_config.model_type == "clip_vision_model"),
        chat_template=chat_template(),
    ).save_pretrained(folder)
    return folder
