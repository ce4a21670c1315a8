"""From text to token ids and back, in the format of Qwen2's tokenizer.json.

A byte-pair encoding over bytes, as GPT-2's: every byte is a letter of its alphabet, so no text is unknown,
and a space is written "Ġ". There is no start token. What controls the model has the form `<|name|>`. So has
what marks an object or its box in an answer, but these are words that a user may type.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minivlm.errors import InputError
from minivlm.processing.tokens import BaseTokenizer, SpecialTokens, backend_of

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CONTROLS = (END, TURN, TURN_END, VISION, VISION_END, IMAGE, VIDEO)
MARKS = [f"<|{kind}_{side}|>" for kind in ("object_ref", "box", "quad") for side in ("start", "end")]

# Contractions, words with the sign before them, single digits, signs, newlines, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

QWEN2_NAMES = SpecialTokens(pad=END, bos=END, eos=TURN_END, unk=END, image=IMAGE)


class Qwen2Tokenizer(BaseTokenizer):
    """Qwen2-VL's and Qwen2.5-VL's. `MARKS` are words if the vocabulary has them.

    Raises InputError: a token of `CONTROLS` is not in the vocabulary.
    """

    origin = "Qwen2-VL"
    processor_class = "Qwen2VLProcessor"

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        missing = [token for token in CONTROLS if backend.token_to_id(token) is None]
        if missing:
            raise InputError(
                f"the tokenizer has no {' and no '.join(missing)}: use the tokenizer.json of {self.origin}"
            )
        words = [mark for mark in MARKS if backend.token_to_id(mark) is not None]
        super().__init__(backend, QWEN2_NAMES, words)
        # Before a text is split, only added tokens are found, and a user's text must not become one of them.
        self.backend.add_special_tokens(list(CONTROLS))
        vocabulary = self.backend.get_vocab()
        self.specials |= {vocabulary[token]: token for token in CONTROLS}
        self.special_ids = frozenset(self.specials)
        self.turn_id, self.video_id = vocabulary[TURN], vocabulary[VIDEO]
        self.vision_id, self.vision_end_id = vocabulary[VISION], vocabulary[VISION_END]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the tokenizer.json of a checkpoint folder.

        Raises InputError: no such file, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, cls.origin))


def build_qwen2_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A small tokenizer in this format, in which every word of the texts is one token.

    Ids: 256 bytes, the pieces of words and the words, then `CONTROLS` and `MARKS`. As in the published one, a
    word after a space and the same word at the start of a line are two tokens.
    """
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
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: merging stops when every word is one token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*CONTROLS, *MARKS)])
    return backend
