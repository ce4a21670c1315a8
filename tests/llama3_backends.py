"""A small tokenizer in the format of Llama 3's files, and the files in which a folder holds it."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from qwen2_backends import TEXTS
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from minivlm.processing.llama3_tokens import BEGIN, CONTROLS, IMAGE, PAD, TURN_END
from minivlm.processing.qwen2_tokens import PIECES


def llama3_backend() -> tokenizers.Tokenizer:
    """256 bytes, what is learned from `TEXTS`, then the tokens between `<|` and `|>`, the picture's last."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROLS])
    assert backend.token_to_id(IMAGE) == backend.get_vocab_size() - 1
    start = backend.token_to_id(BEGIN)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, start)]
    )
    return backend


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    llama3_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
