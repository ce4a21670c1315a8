"""SimVLM (https://arxiv.org/abs/2108.10904): one objective, no tower, and the picture is a prefix.

    picture -> three stages of a ResNet -> N patches ┐
                                                     ├-> GPT-2's blocks -> suffix
    text    -> embedding table ----------------------┘

A text is cut in two at a random place. Picture and first half are the prefix, where everything sees
everything; the second half is written from left to right, and it alone has a loss (`cut_at_random`). A
question with its answer is the same, with a cut that is not random. What differs from PaliGemma: no part has
to be trained before, since the stem learns with the rest, from captions. What differs from ClipCap: patches
see each other inside the language model. Where they lie in the picture is said twice: by a learned position,
which they have apart from the text's, and by a number for each offset in rows and columns, which is added to
the scores of each head in each layer.

The paper says that the objective fits a decoder alone as well as an encoder with a decoder, and takes the
second, which served its tasks better. Here it is the first, under the prefix mask: then a trained GPT-2 fills
all but the stem. There is no published code or checkpoint to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import additive
from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.models.miniatures.base import Miniature, read_values, write_values
from minivlm.models.views import place
from minivlm.processing.inputs import check_rows
from minivlm.text.gpt2 import GPT2Config
from minivlm.vision.conv_stem import ConvStem, ConvStemConfig


@dataclass(frozen=True)
class SimVLMConfig:
    """A stem and a decoder. The defaults have the size of the paper's base model."""

    vision: ConvStemConfig = field(default_factory=ConvStemConfig)
    text: GPT2Config = field(default_factory=GPT2Config)
    image_token_id: int = 50256
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SimVLMConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "simvlm", ConvStemConfig))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "simvlm")


def cut_at_random(
    input_ids: Tensor, attention_mask: Tensor, image_token_id: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Cut the text of each row in two: the pretraining objective, of which the model sees only the arguments.

    The suffix has at least one token. The prefix may be the picture alone, and has a token without one.

    Args:
        input_ids, attention_mask: [B, S].
        generator: makes the cuts reproducible.

    Returns:
        token_type_ids [B, S], 1 in the suffix, and labels [B, S], -100 elsewhere.
    """
    is_text = attention_mask.bool() & (input_ids != image_token_id)
    tokens, least = is_text.sum(dim=1), (~(input_ids == image_token_id).any(dim=1)).long()  # [B]
    draws = torch.rand(len(input_ids), generator=generator).to(input_ids.device)
    cuts = least + (draws * (tokens - least)).long()
    in_suffix = is_text & (is_text.cumsum(dim=1) > cuts[:, None])
    return in_suffix.long(), input_ids.where(in_suffix, -100)


class RelativeAttention(nn.Module):
    """A number for each head and each offset between two patches (https://arxiv.org/abs/2106.04803)."""

    offsets: Tensor

    def __init__(self, num_attention_heads: int, num_patches: int) -> None:
        super().__init__()
        self.side = isqrt(num_patches)
        self.table = nn.Parameter(torch.zeros(num_attention_heads, (2 * self.side - 1) ** 2))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Create `offsets` [N, N], the place in the table of each pair. Counted, and stored in no file."""
        places = torch.arange(self.side, device="cpu")
        grid = torch.cartesian_prod(places, places)  # [N, 2], row and column
        rows, columns = (grid[:, None] - grid + self.side - 1).unbind(dim=-1)
        offsets = (rows * (2 * self.side - 1) + columns).to(self.table.device)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, query_patches: Tensor, key_patches: Tensor) -> Tensor:
        """Numbers of patches, or N for text: [B, T], [B, S] -> what is added to the scores [B, H, T, S]."""
        bias = F.pad(self.table[:, self.offsets], (0, 1, 0, 1))  # [H, N + 1, N + 1], 0 for text
        return bias[:, query_patches[:, :, None], key_patches[:, None]].transpose(0, 1)


class SimVLMCache(KVCache):
    """Beside keys and values: how many tokens of each row are patches, which count apart from the text."""

    of_each_row = ("image_lengths",)
    image_lengths: Tensor | None = None  # [B]


class SimVLM(Miniature):
    """The whole system."""

    config_class: ClassVar = SimVLMConfig
    tower_class: ClassVar = ConvStem
    cache_class: ClassVar = SimVLMCache
    config: SimVLMConfig

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.relative_attention = nn.ModuleList(
            RelativeAttention(config.text.num_attention_heads, config.num_image_tokens)
            for _ in range(config.text.num_hidden_layers)
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [M, C, height, width] -> patches in the decoder's width [M, N, D]."""
        return self.projection(self.patches(pixel_values))

    def reads_apart(self, attention_mask: Tensor) -> bool:
        """No: patches see the text that comes after them."""
        return False

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **pixels: Tensor,
    ) -> Tensor:
        """As in `HasDecoder`; token_type_ids are 0 in the prefix and 1 in the suffix, None: all is prefix."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_rows(input_ids, attention_mask, token_type_ids)
        image = self.encode_images(input_ids, pixel_values, **pixels)
        is_prefix = attention_mask.bool()
        if token_type_ids is not None:
            is_prefix = is_prefix & (token_type_ids == 0)
        return self.read(input_ids, attention_mask, image, prefix_lengths=is_prefix.sum(dim=1))

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None,
        cache: KVCache | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        """Patches and text go through GPT-2 together, the first `prefix_lengths` [B] of them as prefix.

        Without these lengths, all of a first call is prefix, as `prefill` needs it.

        Raises ValueError: the placeholders are too many or too few, or not in front of their row.
        """
        N, is_image = self.config.num_image_tokens, input_ids == self.config.image_token_id
        inputs_embeds = self.merge(input_ids, image)
        kept = cast(SimVLMCache | None, cache)
        if kept is not None and kept.image_lengths is not None:
            image_lengths = kept.image_lengths
        else:  # the first call
            image_lengths = is_image.sum(dim=1)
            prefix_lengths = attention_mask.sum(dim=1) if prefix_lengths is None else prefix_lengths
        if kept is not None:
            kept.image_lengths = image_lengths
        position_ids, mask = place(attention_mask, cache, prefix_lengths)
        if bool((is_image & (position_ids >= N)).any()):
            raise ValueError(f"the {N} image placeholders of a row have to come before its text")

        gpt2, bias = self.language_model, additive(mask, inputs_embeds.dtype)
        text_positions = gpt2.embed_positions((position_ids - image_lengths[:, None]).clamp(min=0))
        x = inputs_embeds + text_positions.masked_fill(is_image[..., None], 0)
        patches = key_patches = position_ids.where(is_image, N)
        if cache is not None:  # whose slots are positions
            key_patches = cache.key_positions.where(cache.key_positions < image_lengths[:, None], N)
        for number, (layer, relative) in enumerate(zip(gpt2.layers, self.relative_attention, strict=True)):
            scores = bias if image is None else bias + relative(patches, key_patches)
            x = layer(x, scores, None if cache is None else partial(cache.write, number))
        return gpt2.ln_f(x)
