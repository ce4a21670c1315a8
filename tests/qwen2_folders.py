"""Whole folders of tiny models of Qwen2-VL and Qwen2.5-VL, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2_5_vl import reference_qwen2_5_vl
from qwen2_backends import qwen2_backend, write_tokenizer
from qwen2_vl import PATCH, TEXT, reference_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def write_folder(folder: Path, system: str, **changes: Any) -> Path:
    """A model with random weights; its pictures have up to 16 tokens."""
    words = qwen2_backend().get_vocab()
    ids = {
        "image_token_id": words["<|image_pad|>"],
        "video_token_id": words["<|video_pad|>"],
        "vision_start_token_id": words["<|vision_start|>"],
        "vision_end_token_id": words["<|vision_end|>"],
    }
    text = TEXT | {
        "vocab_size": len(words) + 3,
        "max_position_embeddings": 512,
        "bos_token_id": words["<|endoftext|>"],
        "pad_token_id": words["<|endoftext|>"],
        "eos_token_id": words["<|im_end|>"],
    }
    build = reference_qwen2_vl if system == "qwen2_vl" else reference_qwen2_5_vl
    build(text=text, ids=ids).save_pretrained(folder)
    write_tokenizer(folder)
    size = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH}
    Qwen2VLImageProcessorPil(size=size, patch_size=changes.get("patch_size", PATCH)).save_pretrained(folder)
    return folder
