"""What all miniatures have beside their formula: a folder, generation, and the loop from rows to answers.

A miniature is a way to let a language model see, at a size that trains in minutes. All stand between the same
two parts, SigLIP's image tower and a decoder. What differs is in two methods: `encode_image` says what a
picture becomes, and `read` says how the decoder gets it. The decoder is GPT-2 here, and Llama in chats.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import (
    PICTURES,
    TOKENIZER,
    check_vocabulary,
    find_folder,
    read_config,
    require_equal,
    special_ids,
)
from minivlm.configs import known, part_of, require_system
from minivlm.models.miniatures.shipped_tower import PREFIX, TOWER, left_out, require_shipped
from minivlm.models.views import CacheShape, HasDecoder
from minivlm.models.writing import ImageTokens
from minivlm.processing.llava import LlavaProcessor
from minivlm.processing.paligemma import Processor
from minivlm.text.gpt2 import GPT2Config, GPT2Decoder
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


class TowerConfig(Protocol):
    """What the config of an image tower has beside its own."""

    @property
    def image_size(self) -> int: ...
    def to_dict(self) -> dict[str, Any]: ...


class TextConfig(CacheShape, Protocol):
    """What the config of a decoder has beside its own."""

    @property
    def vocab_size(self) -> int: ...
    def to_dict(self) -> dict[str, Any]: ...


class MiniatureConfig(ImageTokens, Protocol):
    """What the config of each miniature has beside its own: two parts, and the ids that are no words."""

    @property
    def vision(self) -> TowerConfig: ...
    @property
    def text(self) -> TextConfig: ...
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self: ...
    def to_dict(self) -> dict[str, Any]: ...


def read_values(
    cls: type,
    values: Mapping[str, Any],
    model_type: str,
    vision: type[Any] = SiglipVisionConfig,
    text: type[Any] = GPT2Config,
) -> dict[str, Any]:
    """The fields of a miniature's config in a config.json. Raises InputError: it describes another system."""
    require_system(values, model_type)
    parts = {
        "vision": vision.from_dict(part_of(values, "vision_config")),
        "text": text.from_dict(part_of(values, "text_config")),
    }
    return known(cls, {**values, **special_ids(values), **parts})


def write_values(config: MiniatureConfig, model_type: str) -> dict[str, Any]:
    """The config.json of a miniature's config."""
    own = {field.name: getattr(config, field.name) for field in fields(cast(Any, config))}
    vision, text = own.pop("vision").to_dict(), own.pop("text").to_dict()
    return {"model_type": model_type, "vision_config": vision, "text_config": text, **own}


class Miniature(HasDecoder):
    """The two parts, and what all ways have in common."""

    config_class: ClassVar[type[MiniatureConfig]]
    tower_class: ClassVar[type[Any]] = SiglipVisionModel
    decoder_class: ClassVar[type[Any]] = GPT2Decoder
    config: MiniatureConfig

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = self.tower_class(config.vision)
        self.language_model = self.decoder_class(config.text)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] of any dtype -> the tower's tokens [B, N, D_image]."""
        return self.vision_tower(pixel_values.to(next(self.vision_tower.parameters()).dtype))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> what the decoder gets of a picture, [B, n, D]."""
        raise NotImplementedError

    def merge(self, input_ids: Tensor, image: Tensor | None) -> Tensor:
        """Embed tokens [B, T] and put pictures [M, n, D] into the places of their placeholders: [B, T, D].

        Raises ValueError: the numbers of placeholders and image features differ.
        """
        is_image = input_ids == self.config.image_token_id
        self.check_placeholders(is_image, image)
        inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))
        return inputs_embeds if image is None else inputs_embeds.masked_scatter(is_image[..., None], image)

    def check_placeholders(self, is_image: Tensor, image: Tensor | None) -> None:
        """Raise ValueError unless is_image [B, T] has a place for each of M pictures [M, ...]."""
        pictures, found = 0 if image is None else len(image), int(is_image.sum())
        each = self.config.num_image_tokens
        if found != pictures * each:
            raise ValueError(
                f"input_ids hold {found} image placeholders and there are {pictures} pictures: each needs "
                f"{each} of them, in the order of the rows; let the processor build both"
            )

    def read_on(self, input_ids: Tensor, attention_mask: Tensor, cache: KVCache) -> Tensor:
        """More words [B, T] of rows that a cache holds -> hidden states [B, T, D]."""
        # No picture comes with an `<image>` that the model writes.
        input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        return self.read(input_ids, attention_mask, None, cache)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a folder; dtype None keeps the file's dtype. Raises InputError: see `minivlm.checkpoints`."""
        folder = find_folder(name)
        return cls._load(folder, read_config(folder), dtype, device)

    @classmethod
    def _load(
        cls,
        folder: Path,
        values: Mapping[str, Any],
        dtype: torch.dtype | None,
        device: torch.device | str,
    ) -> Self:
        config = weights.with_generation_ids(folder, cast(Any, cls.config_class.from_dict(values)))
        return weights.load_model(
            cls,
            config,
            folder,
            weights.AS_IT_IS,
            dtype=dtype,
            device=device,
            elsewhere=left_out(folder, values),
        )

    def save_pretrained(self, folder: str | Path, *, tower: bool = True) -> None:
        """Write config.json and model.safetensors, with the names of the modules here.

        Args:
            tower: False leaves the image tower out. It has to be the shipped one.

        Raises InputError: the tower is another one; otherwise as `weights.save_model`.
        """
        values, layout = self.config.to_dict(), weights.AS_IT_IS["as it is"]
        if tower:
            weights.save_model(self, values, Path(folder), layout)
            return
        values[TOWER] = require_shipped(self.vision_tower)
        weights.save_model(self, values, Path(folder), layout, leave_out=(PREFIX,))

    @classmethod
    def open_folder(
        cls, folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
    ) -> tuple[Self, Processor | LlavaProcessor]:
        """Load the model and processor of a folder whose config.json holds `values`.

        Raises InputError: the files do not match each other; otherwise as in `from_pretrained`.
        """
        config = cls.config_class.from_dict(values)
        processor = open_processor(folder, config, config.vision.image_size, config.text.vocab_size)
        return cls._load(folder, values, dtype, device), processor


def open_processor(folder: Path, config: ImageTokens, image_size: int, vocab_size: int) -> Processor:
    """The processor of a folder. Raises InputError: it does not match the config."""
    processor = Processor.from_pretrained(folder, image_seq_length=config.num_image_tokens)
    tokenizer, side = processor.tokenizer, processor.image_processor.image_size
    require_equal(folder, "the id of <image>", config.image_token_id, tokenizer.image_id, TOKENIZER)
    require_equal(folder, "the picture's side", image_size, side, PICTURES)
    check_vocabulary(folder, vocab_size, tokenizer.backend.get_vocab().values())
    return processor
