"""From text to token ids and back, in the format of DeepSeek's tokenizer.json.

A byte-pair encoding over bytes, as Qwen2's, with a start token. The bars and the low line in the names of the
special tokens are not those of a keyboard (U+FF5C, U+2581), so that nobody types them by accident.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers
from tokenizers.processors import TemplateProcessing

from minivlm.processing.tokens import BaseTokenizer, SpecialTokens, backend_of

BEGIN, END, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
DEEPSEEK_NAMES = SpecialTokens(pad=END, bos=BEGIN, eos=END, unk=END, image=IMAGE)


class DeepseekTokenizer(BaseTokenizer):
    """DeepSeek-VL's. Answers end with the token that rows are padded with.

    Raises InputError: a token of `DEEPSEEK_NAMES` but the placeholder is not in the vocabulary.
    """

    origin = "DeepSeek-VL"
    processor_class = "DeepseekVLProcessor"
    settings: ClassVar[dict[str, Any]] = {"extra_special_tokens": {"image_token": IMAGE}}

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend, DEEPSEEK_NAMES, [])
        # For transformers; here, ids are put together without it.
        begin = (BEGIN, self.bos_id)
        self.backend.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the tokenizer.json of a checkpoint folder.

        Raises InputError: no such file, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, cls.origin))
