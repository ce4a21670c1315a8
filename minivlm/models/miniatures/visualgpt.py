"""VisualGPT (https://arxiv.org/abs/2102.10407): GPT-2 asks the picture in every block, and a gate decides.

    picture -> tower -> N patches -> encoder of three layers, whose outputs e1, e2, e3 are all kept
                                       │
    text -> GPT-2's block: a = x + attention(x);  c1, c2, c3 = cross-attention(a, e1 ... e3)
                           h = sum of  gate * a + (1 - gate) * c  over the levels / sqrt(3);  x = h + mlp(h)

What differs from ClipCap: the picture takes no places among the words; every word looks for itself, in every
layer, at every place. What differs from Flamingo: a gate is computed for each channel of each word, and
shares the channel out between language and picture instead of adding the picture on top. So no residual path
leads around the gates, and GPT-2 has to learn along. A share of tau or less is set to zero, and may come
back, since its complement still learns: the gates are *self-resurrecting*. In the paper's formula the gate is
the share of the picture; the authors' program, followed here, makes it that of the language.

The authors read features of detected objects; here they are the tower's patches. Their program knows absent
objects by a sum of exactly zero; here a row of the batch has a picture or has none. `<image>` stands in a row
only to say so. GPT-2 never reads it: as in the original, its row is text alone. A row without a picture goes
through GPT-2's own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive, attend
from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.models.miniatures.base import Miniature, read_values, write_values
from minivlm.models.views import place
from minivlm.processing.inputs import Inputs
from minivlm.text.gpt2 import GPT2Block, GPT2Config
from minivlm.vision.siglip import SiglipVisionConfig


@dataclass(frozen=True)
class VisualGPTConfig:
    """The defaults are those of the paper, for regions of any width."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: GPT2Config = field(default_factory=GPT2Config)
    num_encoder_layers: int = 3  # L, and so many levels to look at
    encoder_intermediate_size: int = 2048
    tau: float = 0.2  # shares up to this are set to zero
    image_token_id: int = 50256
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.tau < 0.5:
            raise InputError(
                f"tau is {self.tau}: expected 0 or more and less than 0.5, where both shares could be zero"
            )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids: one, which says that there is a picture."""
        return 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisualGPTConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "visualgpt"))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "visualgpt")


class EncoderLayer(nn.Module):
    """Post-norm block with ReLU: each sum is normalized, the residual path too."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__()
        D = config.text.hidden_size
        self.self_attn = Attention(D, config.text.num_attention_heads, bias=True)
        self.layer_norm1 = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, config.encoder_intermediate_size)
        self.fc2 = nn.Linear(config.encoder_intermediate_size, D)
        self.layer_norm2 = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, N, D] -> [M, N, D]."""
        x = self.layer_norm1(x + self.self_attn(x))
        x = self.layer_norm2(x + self.fc2(F.relu(self.fc1(x))))
        return x


class VisualEncoder(nn.Module):
    """Regions of a picture, compared with each other at L levels."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.layer_norm = nn.LayerNorm(config.text.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))

    def forward(self, regions: Tensor) -> Tensor:
        """regions [M, N, D_image] -> the outputs of all layers [M, L, N, D]."""
        x = self.layer_norm(F.gelu(self.fc(regions), approximate="tanh"))
        levels = []
        for layer in self.layers:
            x = layer(x)
            levels.append(x)
        return torch.stack(levels, dim=1)


@dataclass(frozen=True)
class Shown:
    """The pictures of a batch, as one block sees them."""

    keys: Tensor  # [B, L, H, N, Dh]
    values: Tensor
    has_picture: Tensor  # [B, 1, 1]


class CrossAttention(nn.Module):
    """Queries from the text, keys and values from the picture."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.fc_q, self.fc_k, self.fc_v, self.c_proj = (nn.Linear(D, D) for _ in range(4))

    def keys_values(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """levels [B, L, N, D] -> keys and values, [B, L, H, N, Dh] each."""
        return self._heads(self.fc_k(levels)), self._heads(self.fc_v(levels))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, T, D], keys and values of one level [B, H, N, Dh] -> [B, T, D]."""
        out = attend(self._heads(self.fc_q(x)), keys, values, None, self.head_dim**-0.5)
        return self.c_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)


class VisualGPTBlock(GPT2Block):
    """GPT-2's block, with a mixture of language and picture between its two parts."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__(config.text)
        D = config.text.hidden_size
        self.tau = config.tau
        self.enc_dec_attn = CrossAttention(config.text)  # one for all levels
        self.fc_alpha = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(config.num_encoder_layers))

    def show(self, levels: Tensor, has_picture: Tensor) -> Shown:
        """What this block needs of the pictures, once for all words: levels [B, L, N, D]."""
        return Shown(*self.enc_dec_attn.keys_values(self.ln_1(levels)), has_picture)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        shown: Shown | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        a = x + self.attn(self.ln_1(x), mask, update_cache=update_cache)
        h = a if shown is None else torch.where(shown.has_picture, self.mix(a, shown), a)
        return h + self.mlp(self.ln_2(h))

    def mix(self, a: Tensor, shown: Shown) -> Tensor:
        """The words so far [B, T, D], and in their place shares of them and of what they see."""
        query, h = self.ln_1(a), torch.zeros_like(a)
        for level, fc_alpha in enumerate(self.fc_alpha):
            c = self.enc_dec_attn(query, shown.keys[:, level], shown.values[:, level])
            alpha = torch.sigmoid(fc_alpha(torch.cat([a, c], dim=-1)))
            h = h + self.gate(alpha) * a + self.gate(1 - alpha) * c
        return h / len(self.fc_alpha) ** 0.5

    def gate(self, share: Tensor) -> Tensor:
        """A share, or zero if it is small."""
        return share * (share > self.tau)


class VisualGPTCache(KVCache):
    """Beside the keys and values of the text, those of the pictures."""

    of_each_row = ("shown",)
    shown: list[Shown] | None = None  # for each block


class VisualGPT(Miniature):
    """The whole system."""

    config_class: ClassVar = VisualGPTConfig
    cache_class: ClassVar = VisualGPTCache
    config: VisualGPTConfig

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__(config)
        self.encoder = VisualEncoder(config)
        self.language_model.layers = nn.ModuleList(
            VisualGPTBlock(config) for _ in range(config.text.num_hidden_layers)
        )

    @property
    def blocks(self) -> list[VisualGPTBlock]:
        """The decoder's blocks."""
        return [cast(VisualGPTBlock, layer) for layer in self.language_model.layers]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [M, C, height, width] -> the levels, one after the other [M, L N, D]."""
        return self.encoder(self.patches(pixel_values)).flatten(1, 2)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Text goes through GPT-2, and asks the picture in every block."""
        is_image = input_ids == self.config.image_token_id
        position_ids, mask = place(attention_mask.bool() & ~is_image, cache)
        shown = self.show(is_image, image)
        if cache is not None:
            kept = cast(VisualGPTCache, cache)
            shown = kept.shown = kept.shown if shown is None else shown
        gpt2 = self.language_model
        x = gpt2.embed(input_ids.masked_fill(is_image, 0)) + gpt2.embed_positions(position_ids)
        bias = additive(mask, x.dtype)
        for number, layer in enumerate(self.blocks):
            update_cache = None if cache is None else partial(cache.write, number)
            x = layer(x, bias, update_cache, None if shown is None else shown[number])
        return gpt2.ln_f(x)

    @property
    def tokens_beside(self) -> int:
        """As of every system with a decoder: those of all levels."""
        return self.config.num_encoder_layers * self.config.vision.num_patches

    def show(self, is_image: Tensor, image: Tensor | None) -> list[Shown] | None:
        """Give each row its picture: where the placeholders are [B, T], pictures [M, L N, D].

        Raises ValueError: the numbers of placeholders and pictures differ, or a row has more than one.
        """
        count, has_picture = 0 if image is None else len(image), is_image.any(dim=1)
        if not int(is_image.sum()) == int(has_picture.sum()) == count:
            raise ValueError(
                f"rows hold {is_image.sum(dim=1).tolist()} image placeholders, and there are {count} "
                "pictures: a row has one placeholder and one picture, or none; let the processor build both"
            )
        if image is None:
            return None
        levels = image.new_zeros(len(is_image), *image.shape[1:])
        levels[has_picture] = image
        levels = levels.unflatten(1, (self.config.num_encoder_layers, -1))  # [B, L, N, D]
        return [layer.show(levels, has_picture[:, None, None]) for layer in self.blocks]

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As in `minivlm.models.protocols.SortsMaps`: after each block's own map come those of the levels.

        The maps of the encoder, which may have other heads than the tower, are left out.
        """
        one = 1 + self.config.num_encoder_layers
        looks = [layer[0] for number, layer in enumerate(reading) if number % one]
        return encoding[: self.config.vision.num_hidden_layers], reading[::one], torch.stack(looks)
