"""Llama 3.2 Vision (https://arxiv.org/abs/2407.21783, section 7): Flamingo's idea in a Llama.

    picture -> up to 4 tiles -> tower -> one linear layer -> 1,601 image tokens a tile ---┐
                                                                                          v
    chat, one token a picture -> embedding table -> Llama 3.1 with eight cross-attentions in between -> answer

What differs from LLaVA: image tokens never enter the row. They take no place in its context, and a text
without pictures is read as before, to the bit. The price is a quarter more layers, and keys and values of all
image tokens for each of the new ones, made once and kept for the whole answer.

Equal to MllamaForConditionalGeneration of transformers (5.23) but for two points in which it differs from
Meta's program, which counts here: which states of the tower are kept (vision/llama_vision.py), and what words
before the first picture are given (text/llama_vision.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from minivlm.checkpoints.layouts import LLAMA_VISION_LAYOUTS
from minivlm.configs import check_types, known, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.pictures_in_rows import CrossAttentionCache, tiles_in_rows
from minivlm.models.views import HasDecoder, place
from minivlm.processing import LlamaVisionProcessor
from minivlm.processing.inputs import Inputs
from minivlm.text.llama_vision import EXTRA_EMBEDDINGS, LlamaVisionDecoder, LlamaVisionTextConfig, Looked
from minivlm.vision.llama_vision import LlamaVisionTower, LlamaVisionTowerConfig


@dataclass(frozen=True)
class LlamaVisionConfig:
    """The defaults are those of transformers, with the ends of an answer of Llama-3.2-11B-Vision-Instruct."""

    vision: LlamaVisionTowerConfig = field(default_factory=LlamaVisionTowerConfig)
    text: LlamaVisionTextConfig = field(default_factory=LlamaVisionTextConfig)
    image_token_id: int = 128256
    pad_token_id: int = 128004
    bos_token_id: int = 128000
    eos_token_id: int | tuple[int, ...] = (128001, 128008, 128009)

    def __post_init__(self) -> None:
        check_types(self)
        rows = self.text.vocab_size + EXTRA_EMBEDDINGS
        if self.image_token_id >= rows:
            raise InputError(
                f"image_token_id is {self.image_token_id}, and the embedding table has {rows} rows: check "
                "the model's config.json"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaVisionConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "mllama")
        text = part_of(values, "text_config")
        image_id = values.get("image_token_id", values.get("image_token_index"))
        ids = {"image_token_id": image_id, **special_ids(values, text)}
        return cls(
            vision=LlamaVisionTowerConfig.from_dict(part_of(values, "vision_config")),
            text=LlamaVisionTextConfig.from_dict(text),
            **known(cls, ids),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        eos = self.eos_token_id
        ids = {
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        }
        return {
            "model_type": "mllama",
            "architectures": ["MllamaForConditionalGeneration"],
            "vision_config": self.vision.to_dict(),
            "text_config": {**self.text.to_dict(), **ids},
            "image_token_index": self.image_token_id,
            **ids,
        }


class LlamaVision(HasDecoder):
    """The whole system."""

    config: LlamaVisionConfig

    def __init__(self, config: LlamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = LlamaVisionTower(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.output_size, config.text.hidden_size)
        self.language_model = LlamaVisionDecoder(config.text)

    def encode_image(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Tiles [M, T, C, height, width] and the number of each canvas [M] -> image tokens [M, T * n, D].

        Raises InputError: as the tower.
        """
        pixel_values = pixel_values.to(self.multi_modal_projector.weight.dtype)
        return self.multi_modal_projector(self.vision_tower(pixel_values, aspect_ratio_ids)).flatten(1, 2)

    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
    ) -> tuple[list[Looked], Tensor] | None:
        """Pictures as the decoder looks at them, and who may look, [B, 1, T, S]; None for text alone.

        Raises InputError: pixels without canvases, or another number of pictures than of their tokens; as
        `encode_image`.
        """
        is_image = input_ids == self.config.image_token_id
        places, pictures = int(is_image.sum()), 0 if pixel_values is None else len(pixel_values)
        if places != pictures:
            raise InputError(
                f"input_ids hold {places} times <|image|> and there are {pictures} pictures: each needs one, "
                "in the order of the rows; let the processor build both"
            )
        if (pixel_values is None) != (aspect_ratio_ids is None):
            raise InputError("pictures need pixel_values and aspect_ratio_ids: let the processor build both")
        if pixel_values is None or aspect_ratio_ids is None:
            return None
        tokens = self.encode_image(pixel_values, aspect_ratio_ids)
        tiles = tokens.unflatten(1, (self.config.vision.max_num_tiles, -1))
        image, sees = tiles_in_rows(is_image, tiles, self.vision_tower.real_tiles(aspect_ratio_ids))
        return self.language_model.read_image(image), sees[:, None]

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: tuple[list[Looked], Tensor] | None,
        cache: CrossAttentionCache | None = None,
    ) -> Tensor:
        """Llama reads the words as always, and some of its layers look at the pictures."""
        looked, image_mask = image or (None, None)
        if cache is not None and image_mask is not None:
            cache.image, cache.image_mask = looked, image_mask[:, :, -1:]  # padding sees what is before it
        inputs_embeds = self.language_model.embed(input_ids)
        placed = place(attention_mask, cache)
        return self.language_model(inputs_embeds, *placed, cache, looked, image_mask)

    def read_on(self, input_ids: Tensor, attention_mask: Tensor, cache: CrossAttentionCache) -> Tensor:
        """As of every system with a decoder; a new word sees what the last one before it saw."""
        inputs_embeds = self.language_model.embed(input_ids)
        placed, image_mask = place(attention_mask, cache), cache.image_mask
        if image_mask is not None:
            image_mask = image_mask.expand(-1, -1, input_ids.shape[1], -1)
        return self.language_model(inputs_embeds, *placed, cache, cache.image, image_mask)

    @property
    def tokens_beside(self) -> int:
        """As of every system with a decoder: those of all tiles."""
        return self.config.vision.max_num_tiles * self.config.vision.num_tokens

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """For the layers that read words; the others look at what `read_image` made once."""
        text = self.config.text.llama
        shape = text.num_hidden_layers, batch_size, text.num_key_value_heads, text.head_dim
        return CrossAttentionCache(*shape, dtype=dtype, device=device)

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As in `minivlm.models.protocols.SortsMaps`, row by row on the canvas of a single picture."""
        config = self.config.vision
        rows, columns = config.canvases[int(pixels["aspect_ratio_ids"][0]) - 1]
        side = config.image_size // config.patch_size
        padded = encoding[0].shape[-1] // config.max_num_tiles  # tokens of a tile in the tower
        is_cross = [number in self.config.text.cross_attention_layers for number in range(len(reading))]
        cross = [layer for layer, looks in zip(reading, is_cross, strict=True) if looks]
        decoder = [layer for layer, looks in zip(reading, is_cross, strict=True) if not looks]
        in_tower = _places(rows, columns, side, padded).to(encoding[0].device)
        in_row = _places(rows, columns, side, config.num_tokens).to(encoding[0].device)
        tower = [layer[..., in_tower, :][..., in_tower] for layer in encoding]
        return tower, decoder, torch.stack([layer[0][..., in_row] for layer in cross])

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> LlamaVision:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = weights.with_generation_ids(folder, LlamaVisionConfig.from_dict(read_config(folder)))
        return weights.load_model(cls, config, folder, LLAMA_VISION_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), LLAMA_VISION_LAYOUTS["hub"])


def _places(rows: int, columns: int, side: int, tile: int) -> Tensor:
    """Where the patches of a canvas, row by row, are among its tiles of so many tokens, class token first."""
    in_tiles = torch.arange(rows * columns * tile).view(rows, columns, tile)[..., 1 : 1 + side * side]
    return in_tiles.unflatten(2, (side, side)).transpose(1, 2).flatten()


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[LlamaVision, LlamaVisionProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `LlamaVision.from_pretrained`.
    """
    processor, config = LlamaVisionProcessor.from_pretrained(folder), LlamaVisionConfig.from_dict(values)
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    require_equal(folder, "the id of <|image|>", config.image_token_id, tokenizer.image_id, TOKENIZER)
    require_equal(folder, "the side of a tile", config.vision.image_size, pictures.image_size, PICTURES)
    tiles = config.vision.max_num_tiles
    require_equal(folder, "the number of tiles", tiles, pictures.max_image_tiles, PICTURES)
    ids = tokenizer.backend.get_vocab().values()
    check_vocabulary(folder, config.text.vocab_size + EXTRA_EMBEDDINGS, ids)
    return LlamaVision.from_pretrained(folder, dtype, device), processor
