"""One computation in three views: a whole row, a prompt into a cache, and one more token.

What differs between systems with a decoder is in two methods: `encode_image` says what a picture becomes, and
`read` says how the decoder gets it. `read` goes with a cache and without one, so training and generation
cannot drift apart: `forward` and `prefill` are the same call.

PaliGemma does not use this file and says the same in its own words, since notebook 06 builds it line by line.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from minivlm import masks
from minivlm.cache import KVCache
from minivlm.models.protocols import ContextLength
from minivlm.models.writing import Writes, WritingConfig, WritingOutput, last_hidden_states
from minivlm.processing.inputs import check_rows


class CacheShape(ContextLength, Protocol):
    """A decoder's config, which says what is kept of a token."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class DecoderConfig(WritingConfig, Protocol):
    """The config of a system with a decoder."""

    @property
    def text(self) -> CacheShape: ...


class HasDecoder(Writes):
    """A system whose decoder reads a row once, and goes on from a cache."""

    config: DecoderConfig
    language_model: Any  # embeds tokens; reads them by their position_ids, mask and cache; makes scores
    cache_class: ClassVar[type[KVCache]] = KVCache  # of a system that keeps more of a row, its own

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.language_model.embed_tokens.weight.device

    def encode_image(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the processor's `pixels` returns -> what stands for the pictures, [M, n, D] or [N, D]."""
        raise NotImplementedError

    def encode_images(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """All that `read` gets of the pictures of a batch [B, S], or None without any."""
        return None if pixel_values is None else self.encode_image(pixel_values, *args, **kwargs)

    def read(self, input_ids: Tensor, attention_mask: Tensor, image: Any, cache: Any = None) -> Tensor:
        """Tokens [B, T] and what `encode_images` made of their pictures -> hidden states [B, T, D].

        With a cache, the tokens go on after those that it holds.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **pixels: Tensor,
    ) -> WritingOutput:
        """Logits at every position, and the loss if labels are given.

        Args:
            input_ids: [B, S].
            pixel_values: what the processor made of all pictures of the batch, or None for text only.
            attention_mask: [B, S], 1 for tokens and 0 for padding on either side; None means no padding.
            token_type_ids: [B, S], only checked: a decoder that reads from left to right needs none.
            labels: [B, S], -100 where there is no loss.
            **pixels: what else `encode_images` takes of what the processor made.

        Raises ValueError: rows that `check_rows` refuses, or another number of pictures than of their places.
        """
        hidden_states = self.hidden_states(input_ids, pixel_values, attention_mask, token_type_ids, **pixels)
        return self.output(hidden_states, labels)

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **pixels: Tensor,
    ) -> Tensor:
        """What the scores of `forward` are made of, [B, S, D]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_rows(input_ids, attention_mask, token_type_ids)
        image = self.encode_images(input_ids, pixel_values, **pixels)
        return self.read(input_ids, attention_mask, image)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> scores [..., V]."""
        return self.language_model.logits(hidden_states)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **pixels: Tensor,
    ) -> tuple[Tensor, Any]:
        """Read pictures and prompt; arguments as in `forward`.

        Returns:
            The hidden state of each row's last token [B, D], and the cache for `decode`.
        """
        check_rows(input_ids, attention_mask, token_type_ids)
        image = self.encode_images(input_ids, pixel_values, **pixels)
        # The precision of embeddings: the table itself may be in int8.
        word = self.language_model.embed(torch.zeros_like(input_ids[:1]))
        cache = self.new_cache(len(input_ids), word.dtype, word.device)
        return last_hidden_states(self.read(input_ids, attention_mask, image, cache), attention_mask), cache

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        """Read one more token of each unfinished row: token_ids [B] -> hidden states [B, D].

        A placeholder that the model writes is a word like others: no picture comes with it.
        """
        return self.read_on(token_ids[:, None], unfinished[:, None], cache)[:, 0]

    def read_on(self, input_ids: Tensor, attention_mask: Tensor, cache: Any) -> Tensor:
        """More words [B, T] of rows that a cache holds, without pictures -> hidden states [B, T, D]."""
        inputs_embeds = self.language_model.embed(input_ids)
        return self.language_model(inputs_embeds, *place(attention_mask, cache), cache)

    def is_picture(self, input_ids: Tensor) -> Tensor:
        """Which tokens [B, S] stand for pictures or videos: boolean [B, S]."""
        config: Any = self.config  # a system without this token says how else pictures stand in a row
        is_picture: Tensor = input_ids == config.image_token_id
        return is_picture

    def reads_apart(self, attention_mask: Tensor) -> bool:
        """Whether the beginning of each row [B, S] can be read before the rest, and gives the same."""
        return True

    @property
    def tokens_beside(self) -> int:
        """Image tokens of a picture that stand beside its row, where the decoder looks them up."""
        return 0

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache of the decoder's shape."""
        text = self.config.text
        shape = text.num_hidden_layers, batch_size, text.num_key_value_heads, text.head_dim
        return self.cache_class(*shape, dtype=dtype, device=device)


def merge_pictures(model: Any, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """Embed tokens [B, S] and put features [pictures, N, D] into the places of their placeholders: [B, S, D].

    Raises ValueError: the numbers of placeholders and image features differ.
    """
    is_image = input_ids == model.config.image_token_id  # [B, S]
    features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
    placeholders = int(is_image.sum())
    if placeholders != features:
        raise ValueError(
            f"input_ids hold {placeholders} image placeholders and the pictures give {features} image "
            f"features: each picture needs {model.config.num_image_tokens} placeholders; let the "
            "processor build both"
        )
    inputs_embeds: Tensor = model.language_model.embed(input_ids.masked_fill(is_image, 0))
    if image_features is None:
        return inputs_embeds
    return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))


def place(
    attention_mask: Tensor, cache: KVCache | None = None, prefix_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions [B, T] of tokens, and the mask [B, 1, T, S] over them and those that a cache holds.

    The mask is causal; with `prefix_lengths` [B], so many tokens of each row are visible to all.
    """
    if cache is None:
        key_is_real = attention_mask.bool()
        position_ids = key_positions = (key_is_real.cumsum(dim=1) - 1).clamp(min=0)
    else:
        position_ids = cache.reserve(attention_mask)
        key_positions, key_is_real = cache.key_positions, cache.key_is_real
    if prefix_lengths is None:
        mask = masks.causal(position_ids, key_positions)
    else:
        mask = masks.prefix_lm(position_ids, key_positions, prefix_lengths)
    return position_ids, (mask & masks.padding(key_is_real))[:, None]
