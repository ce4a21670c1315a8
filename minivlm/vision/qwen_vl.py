"""Qwen-VL's eye (https://arxiv.org/abs/2308.12966): a ViT, and a resampler with a fixed number of queries.

    pixels [B, C, 448, 448] -> 1024 patches -> LayerNorm -> 48 blocks ┐
                                                                      ├-> attention -> LayerNorm -> linear
    256 queries, learned ----------------------------------- LayerNorm┘       [B, 256, 4096]

The ViT is OpenCLIP's bigG, trained on 16 x 16 patches: its table of positions is stretched to the grid that a
larger picture has. There is no class token, no last norm, and GELU is exact. Files pack the queries, keys and
values of one head behind those of the head before; checkpoints/layouts/ unpacks them.

Differences from Flamingo's resampler in `resampler.py`: one layer; queries see patches and not each other;
nothing is added to them afterwards. Which query looks where is a matter of places: queries stand on a coarse
grid and patches on a fine one, and fixed 2-D sines say where. They are added to queries and to keys, after
their norms, and not to values: a place steers the look and is no part of what is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, attend
from minivlm.configs import check_grid, check_types, check_width
from minivlm.errors import InputError
from minivlm.layers import EncoderBlock
from minivlm.vision.pixels import check_pixels

POSITIONS = 256  # of the table, 16 x 16, whatever the picture
QUERY_WIDTH = 128  # of one head of the resampler


@dataclass(frozen=True)
class QwenVLVisionConfig:
    """Qwen-VL's tower and resampler (https://arxiv.org/abs/2308.12966). The defaults are Qwen-VL's."""

    hidden_size: int = 1664
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    mlp_ratio: float = 4.9231  # 8192 / 1664, rounded
    num_channels: int = 3
    image_size: int = 448  # pixels, height = width
    patch_size: int = 14  # pixels, height = width
    num_queries: int = 256
    output_dim: int = 4096
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_grid(self.image_size, self.patch_size)
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise InputError(f"there are {self.num_queries} queries, which form no square: choose 256, say")
        if self.output_dim % QUERY_WIDTH:
            raise InputError(
                f"output_dim is {self.output_dim}, and the heads of the resampler are {QUERY_WIDTH} wide: "
                f"choose a multiple of {QUERY_WIDTH}"
            )

    @property
    def intermediate_size(self) -> int:
        """The width inside the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenVLVisionConfig:
        """From the `visual` part of a config.json, which has names of its own.

        Raises InputError: a size is missing.
        """
        missing = [name for name in _FILE_NAMES.values() if name not in values]
        if missing:
            raise InputError(f"visual in config.json has no {', '.join(missing)}: download the file again")
        found = {ours: values[name] for ours, name in _FILE_NAMES.items()}
        return cls(**found, num_queries=values.get("n_queries", cls.num_queries))

    def to_dict(self) -> dict[str, Any]:
        """The `visual` part of a config.json."""
        values = {name: getattr(self, ours) for ours, name in _FILE_NAMES.items()}
        return values if self.num_queries == POSITIONS else {**values, "n_queries": self.num_queries}


_FILE_NAMES = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "output_dim": "output_dim",
}


def stretch(table: Tensor, positions: int) -> Tensor:
    """A vector for each place of one square grid -> for each place of another: [n, D] -> [positions, D].

    Bicubic, without antialiasing: where the new grid is coarser, places in between are left out.
    """
    old, new = math.isqrt(len(table)), math.isqrt(positions)
    if old == new:
        return table
    grid = table.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]  # [1, D, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def sines_2d(positions: int, width: int) -> Tensor:
    """Fixed vectors for the places of a square grid: [positions, width].

    The first half of a vector says the column and the second the row, each as sines and then cosines of the
    same angles. Two places near each other have similar vectors.
    """
    side = math.isqrt(positions)
    frequencies = 10000.0 ** -(torch.arange(width // 4, device="cpu").float() / (width // 4))
    angles = torch.arange(side, device="cpu").float()[:, None] * frequencies  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)], dim=1)


class QwenVLEmbeddings(nn.Module):
    """One vector per patch, plus what the table of positions says of its place."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.position_embedding = nn.Embedding(POSITIONS, config.hidden_size)
        nn.init.normal_(self.position_embedding.weight, std=config.hidden_size**-0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, N, D]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + stretch(self.position_embedding.weight, patches.shape[1])


class QwenVLVisionModel(nn.Module):
    """The tower, without the resampler.

    >>> model = QwenVLVisionModel(QwenVLVisionConfig(num_hidden_layers=1))
    >>> model(torch.randn(1, 3, 448, 448)).shape
    torch.Size([1, 1024, 1664])
    """

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = QwenVLEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized as CLIP's -> [B, N, D], one vector per patch.

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.layers:
            x = layer(x)
        return x


class QwenVLResampler(nn.Module):
    """The patches of a picture, however many -> as many vectors as there are queries, in the decoder's width.

    >>> QwenVLResampler(QwenVLVisionConfig())(torch.randn(1, 1024, 1664)).shape
    torch.Size([1, 256, 4096])
    """

    pos_embed: Tensor

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        D, eps = config.output_dim, config.layer_norm_eps
        self.query = nn.Parameter(torch.zeros(config.num_queries, D))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.register_buffer("pos_embed", sines_2d(config.num_queries, D))  # fixed, and yet in every file
        self.kv_proj = nn.Linear(config.hidden_size, D, bias=False)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(D, eps=eps) for _ in range(3))
        self.attention = Attention(D, D // QUERY_WIDTH, bias=True)
        self.proj = nn.Linear(D, D, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, N, D_image] -> [B, n, D]."""
        values = self.ln_kv(self.kv_proj(patches))  # [B, N, D]
        keys = values + stretch(self.pos_embed, patches.shape[1])
        queries = self.ln_q(self.query) + self.pos_embed  # [n, D]
        return self.proj(self.ln_post(self._look(queries.expand(len(patches), -1, -1), keys, values)))

    def _look(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        ask = self.attention
        q, k, v = (
            proj(x).unflatten(-1, (-1, ask.head_dim)).transpose(1, 2)
            for proj, x in ((ask.q_proj, queries), (ask.k_proj, keys), (ask.v_proj, values))
        )  # [B, H, n or N, Dh]
        out = attend(q, k, v, None, ask.scale)
        return ask.o_proj(out.transpose(1, 2).flatten(2))  # [B, H, n, Dh] -> [B, n, D]
