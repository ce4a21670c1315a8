"""Llama 3.2 Vision's idea (https://arxiv.org/abs/2407.21783, section 7) between parts as small as the others.

    picture -> SigLIP -> one linear layer -> N image tokens ---┐
                                                               v
    chat, one token a picture -> embedding table -> ... -> cross-attention -> Llama block -> ... -> answer

The new blocks are those of text/llama_vision.py, which says how they differ from Flamingo's: words look at
all image tokens, as no resampler stands between. The tower is SigLIP's, without tiles and without states from
its middle. As in Meta's files, Llama keeps a list of its own, and the new blocks have another: a frozen Llama
is the same module, with the same names, as without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.attention import additive
from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.models.miniatures.base import read_values, write_values
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.models.pictures_in_rows import CrossAttentionCache, tiles_in_rows
from minivlm.models.views import place
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.llama import LlamaConfig
from minivlm.text.llama_vision import CrossAttentionBlock, LlamaVisionTextConfig, Looked
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class CrossAttentionConfig:
    """The default layers are those of the 11B model, as Meta's program counts them."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: LlamaConfig = field(default_factory=LlamaConfig)
    cross_attention_layers: tuple[int, ...] = (3, 7, 11, 15, 19, 23, 27, 31)  # a new one before each of these
    image_token_id: int = 31999
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        check_types(self)
        cross, layers = self.cross_attention_layers, range(self.text.num_hidden_layers)
        if not cross or list(cross) != sorted({number for number in cross if number in layers}):
            raise InputError(
                f"cross_attention_layers is {list(cross)}: expected at least one number of a layer, in "
                f"ascending order, from 0 to {self.text.num_hidden_layers - 1}"
            )
        if self.image_token_id >= self.text.vocab_size:
            raise InputError(
                f"image_token_id is {self.image_token_id}, and the decoder has {self.text.vocab_size} words: "
                "<image> is read as one of them, so make vocab_size larger"
            )

    @property
    def image_size(self) -> int:
        """Pixels of a picture's side."""
        return self.vision.image_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CrossAttentionConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        found = read_values(cls, values, "llama_cross_attention", text=LlamaConfig)
        if isinstance(found.get("cross_attention_layers"), list):
            found["cross_attention_layers"] = tuple(found["cross_attention_layers"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "llama_cross_attention")


class CrossAttentionLlama(LlamaMiniature):
    """The whole system."""

    config_class: ClassVar = CrossAttentionConfig
    cache_class: ClassVar = CrossAttentionCache
    config: CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig) -> None:
        super().__init__(config)
        text = config.text
        self.multi_modal_projector = nn.Linear(config.vision.hidden_size, text.hidden_size)
        sizes = LlamaVisionTextConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rms_norm_eps=text.rms_norm_eps,
            cross_attention_layers=(),
        )
        self.cross_attention_layers = nn.ModuleDict(
            {str(number): CrossAttentionBlock(sizes) for number in config.cross_attention_layers}
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image tokens [B, N, D]."""
        return self.multi_modal_projector(self.patches(pixel_values))

    def encode_images(
        self, input_ids: Tensor, pixel_values: Tensor | None = None
    ) -> tuple[list[Looked], Tensor] | None:
        """Pictures as the new blocks look at them, and who may look, [B, 1, T, S]; None for text alone.

        Raises ValueError: as `check_placeholders`.
        """
        is_image = input_ids == self.config.image_token_id
        self.check_placeholders(is_image, pixel_values)
        if pixel_values is None:
            return None
        tokens = self.encode_image(pixel_values)[:, None]  # [M, 1, N, D]: one tile each
        image, sees = tiles_in_rows(is_image, tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool))
        blocks: Any = self.cross_attention_layers.values()
        return [block.cross_attn.keys_and_values(image) for block in blocks], sees[:, None]

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: tuple[list[Looked], Tensor] | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Llama as always, with a look at the picture before some of its blocks."""
        assert cache is None or isinstance(cache, CrossAttentionCache)
        looked, image_mask = image or (None, None)
        if cache is not None and image_mask is not None:  # words to come see what the last one sees
            cache.image, cache.image_mask = looked, image_mask[:, :, -1:]
        elif cache is not None:
            looked, image_mask = cache.image, cache.image_mask

        decoder, text = self.language_model, self.config.text
        position_ids, mask = place(attention_mask, cache)
        x = decoder.embed(input_ids)
        cos, sin = rotary_angles(position_ids, text.head_dim, text.rope_theta)
        rotary = partial(apply_rotary, cos=cos.to(x.dtype), sin=sin.to(x.dtype))
        bias = additive(mask, x.dtype)
        if image_mask is not None:
            is_blind = ~image_mask.any(dim=-1)[:, 0, :, None]  # [B, T, 1]
            image_bias = additive(image_mask, x.dtype)
        images = iter(looked or ())
        for number, layer in enumerate(decoder.layers):
            if looked is not None and str(number) in self.cross_attention_layers:
                x = self.cross_attention_layers[str(number)](x, next(images), image_bias, is_blind)
            x = layer(x, bias, rotary, partial(cache.write, number) if cache is not None else None)
        return decoder.norm(x)

    @property
    def tokens_beside(self) -> int:
        """As of every system with a decoder: all of them."""
        return self.config.vision.num_patches

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Any = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As in `minivlm.models.protocols.SortsMaps`."""
        maps, decoder, places = iter(reading), [], []
        for number in range(self.config.text.num_hidden_layers):
            if number in self.config.cross_attention_layers:
                places.append(next(maps)[0])
            decoder.append(next(maps))
        return encoding, decoder, torch.stack(places)
