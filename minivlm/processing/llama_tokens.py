"""From text to token ids and back, in the format of Llama's and LLaVA's tokenizer.json.

Like Gemma's (tokens.py) it is a byte-pair encoding with "▁" for spaces and bytes for unknown characters. Two
things differ: start and end are called `<s>` and `</s>`, and a text gets a space before its first word, so
that a word has the same id there as inside a sentence. Whether the text after `<image>` or `</s>` gets one,
too, depends on the file: in published ones and in the original program it does, in files that transformers 5
writes for its LlamaTokenizer it does not. Here the file decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers.processors import TemplateProcessing

from minivlm.errors import InputError
from minivlm.processing.tokens import (
    LOC_TOKENS,
    SEG_TOKENS,
    BaseTokenizer,
    SpecialTokens,
    backend_of,
    encode_plain,
    settings_in,
)

LLAMA_NAMES = SpecialTokens(pad="<pad>", bos="<s>", eos="</s>", unk="<unk>")


class LlamaTokenizer(BaseTokenizer):
    """LLaVA's. `<loc>` and `<seg>` are words only if the vocabulary has them: published ones do not.

    Raises InputError: a token of `names` is not in the vocabulary.
    """

    origin = "LLaVA"
    processor_class = "LlavaProcessor"

    def __init__(self, backend: tokenizers.Tokenizer, names: SpecialTokens = LLAMA_NAMES) -> None:
        vocabulary = backend.get_vocab()
        words = [word for word in (*LOC_TOKENS, *SEG_TOKENS) if word in vocabulary]
        super().__init__(backend, names, words)
        if self.backend.post_processor is None:  # for transformers; here, ids are put together without it
            bos = (names.bos, self.bos_id)
            self.backend.post_processor = TemplateProcessing(single=f"{names.bos} $A", special_tokens=[bos])
        self._later = _without_first_space(self.backend)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load tokenizer.json, and the names of special tokens from tokenizer_config.json if there is one.

        Raises InputError: no tokenizer.json, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, "LLaVA"), _names_in(Path(folder) / "tokenizer_config.json"))

    def encode_later(self, text: str) -> list[int]:
        """The ids of a text that follows a special token, otherwise as `encode`."""
        return encode_plain(self._later, text, self.specials)

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids of `text` where it goes on after `before`, so with nothing put in front of it.

        Raises InputError: a token of the vocabulary would hold the end of one and the start of the other.
        """
        known, both = self.encode_later(before), self.encode_later(before + text)
        if both[: len(known)] != known:
            raise InputError(f"the tokenizer joins {before!r} with what follows: use LLaVA's tokenizer.json")
        return both[len(known) :]


def _without_first_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer for later pieces of a text, where only the first is to get a space."""
    state = json.loads(backend.to_str())
    splitter = json.dumps(state["pre_tokenizer"])
    if '"prepend_scheme": "first"' not in splitter:
        return backend
    state["pre_tokenizer"] = json.loads(splitter.replace('"first"', '"never"'))
    later = tokenizers.Tokenizer.from_str(json.dumps(state))
    later.encode_special_tokens = True  # "encode them as text"
    return later


def _names_in(path: Path) -> SpecialTokens:
    """What a tokenizer_config.json calls the special tokens; Llama's names for those that it leaves out."""
    config, names = settings_in(path), {}
    for kind in ("pad", "bos", "eos", "unk"):
        name = config.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, Mapping) else name  # old files store an object
        names[kind] = name if isinstance(name, str) else getattr(LLAMA_NAMES, kind)
    return SpecialTokens(**names)
