"""A small tokenizer in the format of Llama's files, and the two files in which a folder holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minivlm.processing.chat import SYSTEM

TEXTS = [
    SYSTEM,
    "USER: \nwhat is it? ASSISTANT: a red star",
    "USER: what color is the circle? ASSISTANT: it is green",
    "there are 3 stars.",
]
Kind = Literal["published", "today"]


def llama_backend(kind: Kind = "published", words: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """`<unk>`, `<s>`, `</s>`, 256 bytes, what is learned from `TEXTS`, then `<image>` and `<pad>`.

    "published" puts a space before every piece of a text, as the published files do; "today" only before the
    first, as the files that transformers 5 writes for a LlamaTokenizer.
    """
    learner = tokenizers.Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    learner.normalizer = normalizers.Sequence(spaces)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary.remove("\n")  # Llama has no newline but the byte
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(vocabulary)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if kind == "published":
        backend.normalizer = normalizers.Sequence(spaces)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(list(words))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<image>", "<pad>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write_tokenizer(folder: Path, kind: Kind = "published", tokenizer_class: str | None = None) -> None:
    """tokenizer.json and tokenizer_config.json."""
    llama_backend(kind).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": tokenizer_class or "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},  # as old files do
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
