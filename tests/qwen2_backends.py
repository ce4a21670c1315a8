"""A small tokenizer in the format of Qwen2's files, and the files in which a folder holds it."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from minivlm.processing.qwen2_tokens import build_qwen2_tokenizer

TEXTS = [
    "system\nYou are a helpful assistant.",
    "user\nwhat is it? assistant\na red star",
    "what color is the circle? it is green. what differs?",
]


def qwen2_backend() -> tokenizers.Tokenizer:
    """256 bytes, what is learned from `TEXTS`, then the tokens between `<|` and `|>`."""
    return build_qwen2_tokenizer(TEXTS)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    qwen2_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
