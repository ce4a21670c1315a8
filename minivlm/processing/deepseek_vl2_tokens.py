"""From text to token ids and back, in the format of DeepSeek-VL2's tokenizer.json.

A byte-pair encoding over bytes, as DeepSeek-VL's, with more special tokens: `<|User|>` and `<|Assistant|>`
begin turns, and five words speak of places (deepseek_vl2_boxes.py). The words are for users, too: typed, they
become their tokens. What controls the model stays text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers
from tokenizers import AddedToken

from minivlm.processing.deepseek_tokens import BEGIN, END
from minivlm.processing.deepseek_vl2_boxes import TAGS
from minivlm.processing.tokens import BaseTokenizer, SpecialTokens, backend_of

PAD, USER, ASSISTANT = "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>"
DEEPSEEK_VL2_NAMES = SpecialTokens(pad=PAD, bos=BEGIN, eos=END, unk=END)


class DeepseekVL2Tokenizer(BaseTokenizer):
    """What is missing is added in the order of the original program: `<image>`, the words of `TAGS`, turns.

    Raises InputError: no start, end or padding in the vocabulary.
    """

    origin = "DeepSeek-VL2"
    processor_class = "DeepseekVLV2Processor"
    settings: ClassVar[dict[str, Any]] = {"additional_special_tokens": [USER, ASSISTANT]}

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend, DEEPSEEK_VL2_NAMES, TAGS)
        turns = [AddedToken(name, special=True, normalized=False) for name in (USER, ASSISTANT)]
        self.backend.add_special_tokens(turns)
        vocabulary = self.backend.get_vocab()
        self.user_id, self.assistant_id = vocabulary[USER], vocabulary[ASSISTANT]
        self.specials |= {self.user_id: USER, self.assistant_id: ASSISTANT}
        self.special_ids = frozenset(self.specials)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the tokenizer.json of a checkpoint folder.

        Raises InputError: no such file, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, cls.origin))
