"""A small tokenizer in the format of Qwen2's files, and the files in which a folder holds it."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minivlm.processing.qwen2_tokens import CONTROLS, MARKS

TEXTS = [
    "system\nYou are a helpful assistant.",
    "user\nwhat is it? assistant\na red star",
    "what color is the circle? it is green. what differs?",
]
# Contractions, words with the sign before them, single digits, signs, newlines, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def qwen2_backend() -> tokenizers.Tokenizer:
    """256 bytes, what is learned from `TEXTS`, then the tokens between `<|` and `|>`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*CONTROLS, *MARKS)])
    return backend


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
