"""Flamingo (https://arxiv.org/abs/2204.14198): between its layers, a frozen language model looks at pictures.

    picture -> tower -> resampler -> latents ---┐
                                                v
    text -> embedding table -> ... -> cross-attention -> MLP -> GPT-2 block -> ... -> answer

Pictures are not among the words: one `<image>` token says where each belongs, so a row may hold many. A word
sees one picture only, the last before it:

    row       two dogs <image> this one sleeps <image> that one runs
    picture    0   0      1      1   1     1      2      2   2   2

Words before the first picture get zeros from the attention. The new blocks enter through gates that start at
zero, so training starts from the language model, bit for bit. What differs from ClipCap: every layer may look
the picture up again, and a row without one stays plain GPT-2 after any training of the new parts.

The formula is that of OpenFlamingo (https://github.com/mlfoundations/open_flamingo), whose rows all have
pictures; its files are pickles and not read here. Idefics in transformers gives zeros to the same words, but
has RMSNorm, SwiGLU and optional norms of queries and keys in the block, before layers 0, n, 2n, ... (here:
n - 1, 2n - 1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm import masks
from minivlm.attention import additive
from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.models.miniatures.base import Miniature, read_values, write_values
from minivlm.models.views import place
from minivlm.processing.inputs import Inputs
from minivlm.text.gpt2 import GPT2Config
from minivlm.vision.resampler import CrossAttention, PerceiverResampler, feed_forward
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class FlamingoConfig:
    """The defaults are those of OpenFlamingo, whose published models have no embeddings of time."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: GPT2Config = field(default_factory=GPT2Config)
    num_latents: int = 64
    resampler_depth: int = 6
    resampler_heads: int = 8
    cross_attn_heads: int = 8
    head_dim: int = 64  # of both
    cross_attn_every_n_layers: int = 1
    max_num_media: int = 0  # embeddings for the place of a picture in its row; 0 for none
    max_num_frames: int = 0  # embeddings for the frames of a video; 0 for none
    image_token_id: int = 50256
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)
        if self.cross_attn_every_n_layers > self.text.num_hidden_layers:
            raise InputError(
                f"cross_attn_every_n_layers is {self.cross_attn_every_n_layers}, and the decoder has only "
                f"{self.text.num_hidden_layers} layers: none would see a picture, choose a smaller number"
            )
        if self.image_token_id >= self.text.vocab_size:
            raise InputError(
                f"image_token_id is {self.image_token_id}, and the decoder has {self.text.vocab_size} words: "
                "<image> is one of them in Flamingo, so make vocab_size larger"
            )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlamingoConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "flamingo"))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "flamingo")


class MaskedCrossAttention(CrossAttention):
    """Words look at latents, which have their norm from the resampler."""

    def __init__(self, hidden_size: int, media_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__(hidden_size, media_size, num_heads, head_dim)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        """Words [B, T, D], latents [B, S, D_image], mask [B, T, S], True = may look -> [B, T, D]."""
        out = self.look(self.norm(x), media, additive(mask[:, None], x.dtype))
        # A softmax over nothing is the mean of everything: such words saw all the pictures to come.
        return out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


class GatedCrossAttentionBlock(nn.Module):
    """Pre-norm block whose two branches enter through gates; the norms are in its parts."""

    def __init__(self, hidden_size: int, media_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(hidden_size, media_size, num_heads, head_dim)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(hidden_size)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        """Words [B, T, D], latents [B, S, D_image], mask [B, T, S] -> [B, T, D]."""
        x = x + self.attn_gate.tanh() * self.attn(x, media, mask)
        x = x + self.ff_gate.tanh() * self.ff(x)
        return x


class FlamingoCache(KVCache):
    """Also keeps the pictures: every word that is written sees the last one of its row."""

    of_each_row = ("media", "pictures")

    media: Tensor | None = None  # [B, P * n, D_image], or None without pictures
    pictures: Tensor | None = None  # [B], how many each row has read; None: nothing is read yet

    def reset(self) -> None:
        """Forget all tokens and pictures."""
        super().reset()
        self.media = self.pictures = None


class Flamingo(Miniature):
    """The whole system."""

    config_class: ClassVar = FlamingoConfig
    cache_class: ClassVar = FlamingoCache
    config: FlamingoConfig

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        self.perceiver = PerceiverResampler(
            config.vision.hidden_size,
            config.resampler_depth,
            config.resampler_heads,
            config.head_dim,
            config.num_latents,
            config.max_num_media,
            config.max_num_frames,
        )
        sizes = config.text.hidden_size, config.vision.hidden_size, config.cross_attn_heads, config.head_dim
        n = config.cross_attn_every_n_layers
        self.gated_cross_attn_layers = nn.ModuleDict(
            {
                str(i): GatedCrossAttentionBlock(*sizes)
                for i in range(config.text.num_hidden_layers)
                if (i + 1) % n == 0
            }
        )

    def encode_image(self, pixel_values: Tensor, media_times: Tensor | None = None) -> Tensor:
        """pixel_values [M, C, height, width], or [M, F, C, height, width] for videos -> latents [M, n, D].

        Args:
            media_times: [M], the place of each picture in its row, from 0; None: each is the first.
        """
        frames = 1 if pixel_values.dim() == 4 else pixel_values.shape[1]
        patches = self.patches(pixel_values if pixel_values.dim() == 4 else pixel_values.flatten(0, 1))
        return self.perceiver(patches.unflatten(0, (-1, frames)), media_times)

    def encode_images(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor | None:
        """Each picture knows its place in its row. Raises ValueError: as `check_placeholders`."""
        is_image = input_ids == self.config.image_token_id
        self.check_placeholders(is_image, pixel_values)
        if pixel_values is None:
            return None
        return self.encode_image(pixel_values, is_image.cumsum(dim=1)[is_image] - 1)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """GPT-2 as always, with a look at the picture before some of its blocks."""
        decoder = self.language_model
        media, picture_of_word = self.pictures(input_ids, image, cache)
        if media is not None:
            latents = torch.arange(media.shape[1], device=media.device)[None]  # [1, S]
            may_look = masks.block_diagonal(picture_of_word, latents // self.config.num_latents + 1)
            has_picture = (picture_of_word[:, -1] > 0)[:, None, None]  # [B, 1, 1]; other rows skip the blocks

        position_ids, mask = place(attention_mask, cache)
        x = decoder.embed(input_ids) + decoder.embed_positions(position_ids)
        bias = additive(mask, x.dtype)
        for number, layer in enumerate(decoder.layers):
            if media is not None and str(number) in self.gated_cross_attn_layers:
                informed = self.gated_cross_attn_layers[str(number)](x, media, may_look)
                x = torch.where(has_picture, informed, x)
            x = layer(x, bias, partial(cache.write, number) if cache is not None else None)
        return decoder.ln_f(x)

    def read_on(self, input_ids: Tensor, attention_mask: Tensor, cache: KVCache) -> Tensor:
        """As in the base class; an `<image>` that the model writes is a word of its table."""
        return self.read(input_ids, attention_mask, None, cache)

    @property
    def tokens_beside(self) -> int:
        """As of every system with a decoder: the latents."""
        return self.config.num_latents

    def pictures(
        self, input_ids: Tensor, image: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor | None, Tensor]:
        """Sort pictures [M, n, D_image], which are in the order of their tokens, into their rows.

        Returns:
            The latents of each row [B, P * n, D_image], zeros where a row has fewer than P pictures, or None
            without pictures; and which picture each word sees [B, T], from 1, 0 for none.

        Raises ValueError: as `check_placeholders`.
        """
        assert cache is None or isinstance(cache, FlamingoCache)
        if cache is not None and cache.pictures is not None:  # from now on, the last one
            return cache.media, cache.pictures[:, None].expand_as(input_ids)
        is_image = input_ids == self.config.image_token_id
        self.check_placeholders(is_image, image)
        picture_of_word = is_image.cumsum(dim=1)
        counts = picture_of_word[:, -1]
        media = None
        if image is not None:
            rows = image.new_zeros(len(input_ids), int(counts.max()), *image.shape[1:])  # [B, P, n, D_image]
            rows[is_image.nonzero()[:, 0], picture_of_word[is_image] - 1] = image
            media = rows.flatten(1, 2)
        if cache is not None:
            cache.media, cache.pictures = media, counts
        return media, picture_of_word

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As in `minivlm.models.protocols.SortsMaps`, for a picture that comes before all words.

        A word looks at latents, and these, in the resampler's last layer, at patches: the product of both.
        """
        maps, patches, decoder, places = iter(reading), self.config.vision.num_patches, [], []
        of_latents = encoding[-1][0].mean(dim=0)[:, :patches]  # [n, N]; the rest is on other latents
        for number in range(self.config.text.num_hidden_layers):
            if str(number) in self.gated_cross_attn_layers:
                places.append(next(maps)[0] @ of_latents)  # [H, S, n] @ [n, N]
            decoder.append(next(maps))
        return encoding[: self.config.vision.num_hidden_layers], decoder, torch.stack(places)
