"""Qwen-VL (https://arxiv.org/abs/2308.12966): a picture of any detail costs the decoder 256 tokens.

    picture -> ViT -> 1024 patches -> resampler -> 256 image tokens ┐
                                                                     ├-> Qwen-7B -> answer
    text with <img>, <ref>, <box> -> embedding table ----------------┘

What differs from LLaVA: the adapter asks the patches instead of passing them on, so a finer grid costs the
tower more and the decoder nothing; a picture stands between a token that begins and one that ends it, and
what is between them in `input_ids` is never read; names and places in the picture are written with tags.
Everything is causal, so the picture does not see the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import check_vocabulary, find_folder, read_config, require_equal, special_ids
from minivlm.checkpoints.layouts import qwen_vl_layouts
from minivlm.configs import check_types, known, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.views import HasDecoder, place
from minivlm.processing import QwenVLProcessor
from minivlm.processing.qwen_tokens import VOCABULARY
from minivlm.processing.qwen_vl import chat_format_in
from minivlm.text.qwen import QwenCache, QwenConfig, QwenDecoder
from minivlm.vision.qwen_vl import QwenVLResampler, QwenVLVisionConfig, QwenVLVisionModel

BEFORE_IMAGE = 212, 213  # tokens from `<|im_end|>` and from `<|im_start|>` to `<img>`


@dataclass(frozen=True)
class QwenVLConfig:
    """Qwen-VL: a ViT, a resampler, a Qwen. The defaults are those of Qwen-VL-Chat."""

    vision: QwenVLVisionConfig = field(default_factory=QwenVLVisionConfig)
    text: QwenConfig = field(default_factory=QwenConfig)
    image_start_id: int = 151857  # `<img>`, then `</img>`, then `<imgpad>`
    chat_format: str = "chatml"  # "raw" for a model that has not learned to chat
    pad_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151643

    def __post_init__(self) -> None:
        check_types(self)
        if self.vision.output_dim != self.text.hidden_size:
            raise InputError(
                f"output_dim of the resampler is {self.vision.output_dim} and hidden_size of the decoder "
                f"{self.text.hidden_size}: they must be equal, check the model's config.json"
            )
        if self.image_token_id >= self.text.vocab_size:
            raise InputError(
                f"image_start_id is {self.image_start_id} and needs two more ids after it, but vocab_size is "
                f"{self.text.vocab_size}: check the model's config.json"
            )
        if self.chat_format not in ("chatml", "raw"):
            raise InputError(f"chat_format is {self.chat_format!r}: expected 'chatml' or 'raw'")

    @property
    def image_token_id(self) -> int:
        """What fills the places of a picture, `<imgpad>`."""
        return self.image_start_id + 2

    @property
    def num_image_tokens(self) -> int:
        """Places of one picture, between `<img>` and `</img>`."""
        return self.vision.num_queries

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """What ends an answer; in a chat also the marks of a turn."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        marks = (self.image_start_id - tokens for tokens in BEFORE_IMAGE)
        return (*ends, *marks) if self.chat_format == "chatml" else ends

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenVLConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "qwen")
        visual = part_of(values, "visual")
        if not visual:
            raise InputError(
                "config.json is of Qwen without pictures (it has no `visual`): only Qwen-VL and Qwen-VL-Chat "
                "are supported here"
            )
        return cls(
            vision=QwenVLVisionConfig.from_dict(visual),
            text=QwenConfig.from_dict(values),
            **known(cls, {**special_ids(values), "image_start_id": visual.get("image_start_id")}),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json in the published form."""
        return {
            "model_type": "qwen",
            "architectures": ["QWenLMHeadModel"],
            **self.text.to_dict(),
            "visual": {**self.vision.to_dict(), "image_start_id": self.image_start_id},
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_id,
        }

    def with_generation(self, folder: Path) -> QwenVLConfig:
        """With the form of prompts and the ids that a folder's generation_config.json has.

        Raises InputError: as `chat_format_in`.
        """
        config = weights.with_generation_ids(folder, self)
        return replace(config, chat_format=chat_format_in(folder))


class QwenVL(HasDecoder):
    """The whole system."""

    cache_class: ClassVar = QwenCache
    config: QwenVLConfig

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = QwenVLVisionModel(config.vision)
        self.resampler = QwenVLResampler(config.vision)
        self.language_model = QwenDecoder(config.text)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image features [B, n, D] in the decoder's width."""
        return self.resampler(self.vision_tower(pixel_values.to(self.resampler.query.dtype)))

    def is_place(self, input_ids: Tensor) -> Tensor:
        """Which tokens [B, S] are between `<img>` and `</img>`: boolean [B, S].

        Raises ValueError: a picture that does not begin, does not end, or has another number of places.
        """
        start, N = self.config.image_start_id, self.config.num_image_tokens
        opens, closes = input_ids == start, input_ids == start + 1
        is_place = (opens.cumsum(dim=1) > closes.cumsum(dim=1)) & ~opens
        # Each closes after its N places, and none begins before another has ended.
        closing, closed = F.pad(opens, (N + 1, 0)), F.pad(closes, (0, N + 1))
        if not torch.equal(closing, closed) or int(is_place.sum()) != N * int(opens.sum()):
            raise ValueError(
                f"input_ids have <img> ({start}) and </img> ({start + 1}) that do not match: expected "
                f"{N} tokens between the two of each picture; let the processor build them"
            )
        return is_place

    def merge(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed the tokens and put the image features between `<img>` and `</img>`.

        Args:
            input_ids: [B, S], with n tokens of any kind for each picture, in order.
            image_features: [pictures, n, D], or None without pictures. A row may have none or several.

        Returns:
            [B, S, D].

        Raises:
            ValueError: as `is_place`; the numbers of places and image features differ.
        """
        is_place = self.is_place(input_ids)  # [B, S]
        places, pictures = int(is_place.sum()), 0 if image_features is None else len(image_features)
        if places != pictures * self.config.num_image_tokens:
            raise ValueError(
                f"input_ids hold places for {places // self.config.num_image_tokens} pictures, and there are "
                f"{pictures}: let the processor build both"
            )
        inputs_embeds = self.language_model.embed(input_ids)
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_place[..., None], image_features.to(inputs_embeds.dtype))

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Qwen reads pictures and words alike, from left to right."""
        return self.language_model(self.merge(input_ids, image), *place(attention_mask, cache), cache)

    def is_picture(self, input_ids: Tensor) -> Tensor:
        """As of every system with a decoder: the places of a picture, and the two marks around them."""
        start = self.config.image_start_id
        return self.is_place(input_ids) | (input_ids == start) | (input_ids == start + 1)

    def reads_apart(self, attention_mask: Tensor) -> bool:
        """Not if a row is so long that all of its angles are stretched."""
        return int(attention_mask.sum(dim=1).max()) <= self.config.text.seq_length

    def _limits(self) -> dict[str, Any]:
        return {**super()._limits(), "eos_token_id": self.config.end_token_ids}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> QwenVL:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = QwenVLConfig.from_dict(read_config(folder)).with_generation(folder)
        return _load(config, folder, dtype, device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors in the published layout."""
        layout = qwen_vl_layouts(self.config.vision.num_attention_heads)["hub"]
        generation = {"chat_format": self.config.chat_format}
        weights.save_model(self, self.config.to_dict(), Path(folder), layout, generation=generation)


def _load(
    config: QwenVLConfig, folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> QwenVL:
    layouts = qwen_vl_layouts(config.vision.num_attention_heads)
    return weights.load_model(QwenVL, config, folder, layouts, dtype=dtype, device=device)


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[QwenVL, QwenVLProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `QwenVL.from_pretrained`.
    """
    config = QwenVLConfig.from_dict(values).with_generation(folder)
    processor = QwenVLProcessor.from_pretrained(folder, config.vision.image_size, config.num_image_tokens)
    tokenizer = processor.tokenizer
    require_equal(folder, "the id of <img>", config.image_start_id, tokenizer.image_start_id, VOCABULARY)
    check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())
    return _load(config, folder, dtype, device), processor
