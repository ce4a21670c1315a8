"""What the miniatures with a Llama have in common: their rows are LLaVA's chats, and read from left to right.

The folder's processor is LLaVA's. How many image tokens a picture has, the model's config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.checkpoints.hub import PICTURES, TOKENIZER, check_vocabulary, require_equal
from minivlm.models.miniatures.base import Miniature, MiniatureConfig
from minivlm.models.views import place
from minivlm.processing.llava import LlavaProcessor
from minivlm.text.llama import LlamaDecoder


class ChatsConfig(MiniatureConfig, Protocol):
    """What the config of each of them has beside its own."""

    @property
    def image_size(self) -> int: ...  # pixels of a picture's side, before the model makes anything of it


class LlamaMiniature(Miniature):
    """A miniature that is a Llama instead of a GPT-2."""

    config_class: ClassVar[type[ChatsConfig]]
    decoder_class: ClassVar[type[Any]] = LlamaDecoder
    processor_class: ClassVar[type[LlavaProcessor]] = LlavaProcessor
    config: ChatsConfig

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Any, cache: KVCache | None = None
    ) -> Tensor:
        """Llama reads pictures and words alike, from left to right."""
        return self.language_model(self.merge(input_ids, image), *place(attention_mask, cache), cache)

    @classmethod
    def open_folder(
        cls, folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
    ) -> tuple[Self, LlavaProcessor]:
        """As of every miniature."""
        config = cls.config_class.from_dict(values)
        processor = cls.processor_class.from_pretrained(folder)
        processor.image_seq_length = config.num_image_tokens
        tokenizer, side = processor.tokenizer, processor.image_processor.image_size
        require_equal(folder, "the id of <image>", config.image_token_id, tokenizer.image_id, TOKENIZER)
        require_equal(folder, "the picture's side", config.image_size, side, PICTURES)
        check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())
        return cls._load(folder, values, dtype, device), processor
