"""Small tokenizers in the form of CLIP's and SigLIP's tokenizer.json, trained on a few sentences."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["a photo of a cat.", "a photo of two dogs", "a drawing of a cat and a dog", "the red star"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def clip_backend() -> tokenizers.Tokenizer:
    """In the form of CLIP's tokenizer.json: bytes as letters, ends of words marked, specials last."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    # As in the published vocabulary: 256 bytes, 256 bytes at the end of a word, merges, start, end.
    learned = json.loads(backend.to_str())
    words = list(learned["model"]["vocab"])
    words += [f"{letter}</w>" for letter in sorted(alphabet) if f"{letter}</w>" not in words]
    learned["model"]["vocab"] = {word: index for index, word in enumerate([*words, BOS, EOS])}
    backend = tokenizers.Tokenizer.from_str(json.dumps(learned))
    backend.add_special_tokens([BOS, EOS])
    ids = {name: backend.token_to_id(name) for name in (BOS, EOS)}
    backend.post_processor = processors.RobertaProcessing(
        (EOS, ids[EOS]), (BOS, ids[BOS]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def siglip_backend() -> tokenizers.Tokenizer:
    """In the form of SigLIP's tokenizer.json: a Unigram model of lower-case words, "</s>" behind a text."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,:!]"), ""), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([text.lower() for text in CORPUS], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return backend
