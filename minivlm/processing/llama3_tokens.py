"""From text to token ids and back, in the format of Llama 3's tokenizer.json.

A byte-pair encoding over bytes, as GPT-2's and Qwen2's, with a start token. What controls the model has the
form `<|name|>`. A picture is a single token, whatever its size: its patches never enter the row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import tokenizers

from minivlm.errors import InputError
from minivlm.processing.tokens import BaseTokenizer, SpecialTokens, backend_of

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IMAGE = "<|image|>"
CONTROLS = (BEGIN, END, PAD, HEADER, HEADER_END, TURN_END, IMAGE)

LLAMA3_NAMES = SpecialTokens(pad=PAD, bos=BEGIN, eos=TURN_END, unk=END, image=IMAGE)


class Llama3Tokenizer(BaseTokenizer):
    """Llama 3.2 Vision's. Raises InputError: a token of `CONTROLS` is not in the vocabulary."""

    origin = "Llama 3.2 Vision"
    processor_class = "MllamaProcessor"

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        missing = [token for token in CONTROLS if backend.token_to_id(token) is None]
        if missing:
            raise InputError(
                f"the tokenizer has no {' and no '.join(missing)}: use the tokenizer.json of {self.origin}"
            )
        super().__init__(backend, LLAMA3_NAMES, [])
        # Before a text is split, only added tokens are found, and a user's text must not become one of them.
        self.backend.add_special_tokens(list(CONTROLS))
        vocabulary = self.backend.get_vocab()
        self.specials |= {vocabulary[token]: token for token in CONTROLS}
        self.special_ids = frozenset(self.specials)
        self.header_id, self.header_end_id = vocabulary[HEADER], vocabulary[HEADER_END]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the tokenizer.json of a checkpoint folder.

        Raises InputError: no such file, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, cls.origin))
