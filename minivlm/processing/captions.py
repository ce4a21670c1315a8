"""From captions to the ids that the text towers of CLIP and SigLIP read.

Gemma's tokenizer (tokens.py) builds a prompt for the model to continue. These tokenizers encode a caption of
bounded length that is read once:

- CLIP (https://arxiv.org/abs/2103.00020): start, words, end, at most 77 tokens; the end token represents the
  text.
- SigLIP (https://arxiv.org/abs/2303.15343): words, end, then padding to exactly 64 tokens (16 in some
  folders); the last position represents the text.

tokenizer.json defines how text is split into words. All of these models were trained on lowercase text,
padded on the right. Most files lowercase the text themselves; for those that leave it to the program, as
SigLIP 2 does (https://arxiv.org/abs/2502.14786), it is done here. What else the programs do to a text before
they split it, see cleaning.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import normalizers
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.cleaning import clean_for_clip, remove_punctuation
from minivlm.processing.tokens import check_unicode, encode_plain, read_backend, settings_in


@dataclass(frozen=True)
class CaptionForm:
    """What surrounds the words of a caption. Tokens are named as in tokenizer.json."""

    bos_token: str | None
    eos_token: str
    pad_token: str
    max_length: int  # tokens, including bos and eos
    pad_to_max_length: bool  # otherwise to the longest caption in the batch
    processor_class: str  # the processor's class in transformers
    tokenizer_class: str  # the tokenizer's, where a folder names none

    def changed_by(self, config: Mapping[str, Any], max_length: int | None) -> CaptionForm:
        """With the token names of a tokenizer_config.json, if the folder has one, and another length."""
        names: dict[str, Any] = {}
        for field in ("bos_token", "eos_token", "pad_token"):
            name = config.get(field)
            name = name.get("content") if isinstance(name, Mapping) else name  # old files store an object
            if isinstance(name, str) and getattr(self, field) is not None:
                names[field] = name
        if max_length is None:
            length = config.get("model_max_length")
            # If there is no limit, transformers writes a number of thirty digits.
            max_length = int(length) if isinstance(length, int) and length < 10**6 else self.max_length
        return replace(self, **names, max_length=max_length)


CLIP_CAPTIONS = CaptionForm(
    "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", 77, False, "CLIPProcessor", "CLIPTokenizer"
)
SIGLIP_CAPTIONS = CaptionForm(None, "</s>", "</s>", 64, True, "SiglipProcessor", "SiglipTokenizer")


class CaptionTokenizer:
    """Captions -> ids [B, T]. User input is plain text: "<|endoftext|>" in a caption does not end it.

    This object takes over the given `tokenizers.Tokenizer`: it turns off padding, truncation and automatic
    special tokens. `form` says what is added instead.

    Raises InputError: a token of the form is not in the vocabulary, or max_length leaves no room for a word.
    """

    def __init__(self, backend: tokenizers.Tokenizer, form: CaptionForm) -> None:
        names = [name for name in (form.bos_token, form.eos_token, form.pad_token) if name is not None]
        missing = [name for name in dict.fromkeys(names) if backend.token_to_id(name) is None]
        if missing:
            raise InputError(
                f"the tokenizer has no {' and no '.join(missing)}: take tokenizer.json and "
                "tokenizer_config.json from the same checkpoint"
            )
        backend.add_special_tokens(list(dict.fromkeys(names)))  # in some files they are only words
        _make_lower_case(backend)
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "encode them as text"
        self.backend = backend
        self.form = form
        added = backend.get_added_tokens_decoder()
        self.specials = {index: token.content for index, token in added.items() if token.special}
        ids = {name: index for index, name in self.specials.items()}
        self.before = [] if form.bos_token is None else [ids[form.bos_token]]
        self.eos_id, self.pad_id = ids[form.eos_token], ids[form.pad_token]
        if form.max_length < len(self.before) + 2:
            raise InputError(f"max_length is {form.max_length}: it leaves no room for a word")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, form: CaptionForm, max_length: int | None = None
    ) -> CaptionTokenizer:
        """Load tokenizer.json and, if present, tokenizer_config.json; `max_length` overrides the file's.

        Raises InputError: no tokenizer.json, not a tokenizer, or tokens are missing (see the class).
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"{folder} has no tokenizer.json: use a complete checkpoint folder, or let transformers "
                "write one from its other tokenizer files"
            )
        backend = read_backend(path)
        config_path = Path(folder) / "tokenizer_config.json"
        config = settings_in(config_path)
        kind = str(config.get("tokenizer_class") or form.tokenizer_class).removesuffix("Fast")
        if kind == "SiglipTokenizer":  # of SigLIP 1; others leave the text to the file
            if config.get("do_lower_case") is False:
                raise InputError(f"{config_path}: do_lower_case is False: only True is supported here")
            remove_punctuation(backend)
        return cls(backend, form.changed_by(config, max_length))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, and the tokenizer_config.json that tells `transformers` how to load it."""
        folder = Path(folder)
        with write_aside(folder / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": self.form.processor_class,
            **({} if self.form.bos_token is None else {"bos_token": self.form.bos_token}),
            "eos_token": self.form.eos_token,
            "pad_token": self.form.pad_token,
            "model_max_length": self.form.max_length,
            "padding_side": "right",
        }
        with write_aside(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones: an embedding needs at least this many rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of the words alone. Raises InputError: a string that is not valid Unicode."""
        check_unicode(text)
        if self.form.tokenizer_class == "CLIPTokenizer":
            text = clean_for_clip(text)
        return encode_plain(self.backend, text, self.specials)

    def __call__(self, texts: str | Sequence[str], truncate: bool = False) -> Tensor:
        """Captions -> input_ids [B, T] int64, padded on the right.

        Args:
            truncate: cut off words of a caption that is too long; its end token stays.

        Raises InputError: no captions, something that is not text, or a caption that is too long.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise InputError("there are no captions: give at least one")
        room = self.form.max_length - len(self.before) - 1
        rows = []
        for number, text in enumerate(given):
            if not isinstance(text, str):
                raise InputError(f"caption {number + 1} is of type {type(text).__name__}: expected a string")
            words = self.encode(text)
            if len(words) > room and not truncate:
                raise InputError(
                    f"caption {number + 1} has {len(words)} tokens, but the model reads at most {room}: "
                    "shorten it, or cut off its end with truncate=True"
                )
            rows.append([*self.before, *words[:room], self.eos_id])
        length = self.form.max_length if self.form.pad_to_max_length else max(len(row) for row in rows)
        return torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows])


def _make_lower_case(backend: tokenizers.Tokenizer) -> None:
    """Lowercase text before the file's normalizer runs, unless that already does it."""
    normalizer = backend.normalizer
    if normalizer is None:
        backend.normalizer = normalizers.Lowercase()
    elif normalizer.normalize_str("A") != normalizer.normalize_str("a"):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizer])
