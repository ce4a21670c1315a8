"""ClipCap (https://arxiv.org/abs/2111.09734): one vector of a picture becomes a few words that do not exist.

    picture -> tower -> one vector -> mapper -> k prefix vectors ┐
                                                                 ├-> GPT-2 -> caption
    text    -> embedding table ----------------------------------┘

The mapper is all that needs training: the language model may stay as it is, and is told about the picture in
vectors that it takes for words. Two mappers: an MLP, which the authors use when GPT-2 learns too, and a small
transformer, when it is frozen. What differs from LLaVA: the picture is one vector, so nothing can be looked
up again, and the prefix has k positions whatever the picture's size. The vector keeps its length.

The original reads CLIP's pooled vector. The tower here has no such head, so the mean of its tokens is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention
from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.models.miniatures.base import Miniature, read_values, write_values
from minivlm.models.views import place
from minivlm.processing.inputs import Inputs
from minivlm.text.gpt2 import GPT2Config
from minivlm.vision.siglip import SiglipVisionConfig

HEADS = 8  # of the transformer that maps; its MLP is twice as wide as its vectors


@dataclass(frozen=True)
class ClipCapConfig:
    """The defaults are those of the paper, for a picture's vector of any width."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: GPT2Config = field(default_factory=GPT2Config)
    mapping_type: str = "transformer"  # or "mlp"
    prefix_length: int = 10  # k
    clip_length: int = 10  # vectors that the transformer makes of the picture's one; the MLP has none
    num_mapping_layers: int = 8
    image_token_id: int = 50256
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)
        if self.mapping_type not in MAPPERS:
            raise InputError(f"mapping_type is {self.mapping_type!r}: expected one of {', '.join(MAPPERS)}")

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return self.prefix_length

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClipCapConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        return cls(**read_values(cls, values, "clipcap"))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "clipcap")


class MLPMapper(nn.Module):
    """Two linear layers with tanh between them; the last makes k vectors at once."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        width = config.text.hidden_size * config.prefix_length
        self.fc1 = nn.Linear(config.vision.hidden_size, width // 2)
        self.fc2 = nn.Linear(width // 2, width)
        self.prefix_length = config.prefix_length

    def forward(self, x: Tensor) -> Tensor:
        """The picture's vector [B, D_image] -> prefix [B, k, D]."""
        return self.fc2(torch.tanh(self.fc1(x))).unflatten(-1, (self.prefix_length, -1))


class MapperBlock(nn.Module):
    """Pre-norm block with ReLU, whose queries, keys and values have no bias."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.self_attn = Attention(hidden_size, HEADS)
        self.self_attn.o_proj = nn.Linear(hidden_size, hidden_size)  # this one has a bias
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.norm1(x))
        x = x + self.fc2(F.relu(self.fc1(self.norm2(x))))
        return x


class TransformerMapper(nn.Module):
    """k learned constants look at vectors of the picture, and at each other, and become the prefix."""

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.clip_length = config.clip_length
        self.linear = nn.Linear(config.vision.hidden_size, config.clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, width))
        self.layers = nn.ModuleList(MapperBlock(width) for _ in range(config.num_mapping_layers))

    def forward(self, x: Tensor) -> Tensor:
        """The picture's vector [B, D_image] -> prefix [B, k, D]."""
        image = self.linear(x).unflatten(-1, (self.clip_length, -1))  # [B, c, D]
        x = torch.cat([image, self.prefix_const.expand(len(x), -1, -1)], dim=1)  # [B, c + k, D]
        for layer in self.layers:
            x = layer(x)
        return x[:, self.clip_length :]


MAPPERS: dict[str, type[MLPMapper | TransformerMapper]] = {"mlp": MLPMapper, "transformer": TransformerMapper}


class ClipCap(Miniature):
    """The whole system."""

    config_class: ClassVar = ClipCapConfig
    config: ClipCapConfig

    def __init__(self, config: ClipCapConfig) -> None:
        super().__init__(config)
        self.clip_project = MAPPERS[config.mapping_type](config)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> the prefix [B, k, D]."""
        return self.clip_project(self.patches(pixel_values).mean(dim=1))

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs | None = None
    ) -> tuple[list[Tensor], list[Tensor], None]:
        """As in `minivlm.models.protocols.SortsMaps`: the prefix has no places in the picture."""
        return encoding[: self.config.vision.num_hidden_layers], reading, None

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """The prefix stands in front of the text, and GPT-2 reads on as always."""
        position_ids, mask = place(attention_mask, cache)
        return self.language_model(self.merge(input_ids, image), position_ids, mask, cache)
