"""A whole folder of each system that answers, with tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepseek_vl
import deepseek_vl2
import qwen2_folders
from llama3_backends import llama3_backend, write_tokenizer
from llama_vision import reference_llama_vision
from llava import write_llava
from miniatures import SYSTEMS as MINIATURES
from miniatures import tiny
from qwen_vl import write_qwen_vl
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from minivlm.models.load import SHIPPED
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.models.miniatures.two_towers import TwoTowersConfig
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.llava import LlavaImageProcessor
from minivlm.training.recipe import TrainingConfig, build

LLAMA_SEED = 9  # of a model that writes letters, and nothing that fonts do not have


def write_llama_vision(folder: Path) -> Path:
    """As transformers does."""
    words = llama3_backend().get_vocab()
    text = {
        "vocab_size": len(words) - 1,  # <|image|> is in the table, and has no score
        "max_position_embeddings": 512,
        "bos_token_id": words["<|begin_of_text|>"],
        "eos_token_id": words["<|eot_id|>"],
        "pad_token_id": words["<|finetune_right_pad_id|>"],
    }
    model = reference_llama_vision(LLAMA_SEED, text=text)
    model.config.image_token_index = words["<|image|>"]
    model.save_pretrained(folder)
    write_tokenizer(folder)
    MllamaImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_miniature(name: str, folder: Path) -> Path:
    """An untrained model that knows the words of the drawn world."""
    processor = build(TrainingConfig(image_size=16, patch_size=8))[1]
    size = processor.tokenizer.vocab_size
    parts = tiny(name).config
    more = {}
    if isinstance(parts, TwoTowersConfig):
        more["high_res_vision"] = replace(parts.high_res_vision, image_size=32)
    model = tiny(
        name,
        vision=replace(parts.vision, image_size=16, patch_size=8),
        text=replace(parts.text, vocab_size=size, max_position_embeddings=256),
        image_token_id=processor.tokenizer.image_id,
        eos_token_id=processor.tokenizer.eos_id,
        pad_token_id=processor.tokenizer.pad_id,
        bos_token_id=processor.tokenizer.bos_id,
        **more,
    )
    if isinstance(model, LlamaMiniature):
        pictures = LlavaImageProcessor(image_size=model.config.image_size)
        processor = model.processor_class(LlamaTokenizer.from_pretrained(SHIPPED), pictures, 8, "full", "", 0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "paligemma": lambda folder: SHIPPED,
    "llava": write_llava,
    "llama_vision": write_llama_vision,
    "qwen_vl": write_qwen_vl,
    "qwen2_vl": lambda folder: qwen2_folders.write_folder(folder, "qwen2_vl"),
    "qwen2_5_vl": lambda folder: qwen2_folders.write_folder(folder, "qwen2_5_vl"),
    "deepseek_vl": lambda folder: deepseek_vl.write_folder(folder, False),
    "deepseek_vl_hybrid": lambda folder: deepseek_vl.write_folder(folder, True),
    "deepseek_vl2, latent": lambda folder: deepseek_vl2.write_folder(folder, "latent"),
    "deepseek_vl2, heads": lambda folder: deepseek_vl2.write_folder(folder, "heads"),
    **{name: partial(write_miniature, name) for name in MINIATURES},
}
