"""The image tower of Llama 3.2 Vision (https://arxiv.org/abs/2407.21783, section 7): all tiles in one row.

    tiles -> patches + where the tile lies -> class token + positions -> local blocks -> + where it lies
          -> global blocks -> [the end | what five blocks in between were given], 6 x D numbers for each token

What differs from CLIP's tower, from which it was grown: a picture is up to four tiles, which see each other
in every block, so "local" blocks are only the older ones. Everything that was added enters through a gate
that starts at zero. And nothing is thrown away: early states keep small things, such as letters, that later
ones have given up for meaning.

Two traps. The five states are interleaved: numbers 0 to 4 after the first D are the first channel of all
five. And tokens are padded with zeros to a multiple of 8; padding and missing tiles are closed only to each
other, so real tokens do see them, in the original and here.

The formula is Meta's (https://github.com/meta-llama/llama-models, `multimodal/model.py`): state i is what
block i is given. transformers (MllamaVisionModel, 5.23) takes what the block gives, one too late; it computes
the same as here if told [i - 1, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.configs import check_activation, check_grid, check_types, check_width, expect, known
from minivlm.errors import InputError
from minivlm.layers import MLP
from minivlm.processing.canvases import Canvas, supported_canvases

MULTIPLE = 8  # tokens of a tile are padded to
EPS = 1e-5  # of the two norms outside of the blocks


@dataclass(frozen=True)
class LlamaVisionTowerConfig:
    """The defaults are those of transformers: Llama-3.2-11B-Vision."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32  # local blocks
    num_global_layers: int = 8
    attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448  # pixels of a tile, height = width
    patch_size: int = 14
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)  # blocks whose input is kept
    norm_eps: float = 1e-5
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.attention_heads)
        check_activation(self.hidden_act)
        check_grid(self.image_size, self.patch_size)
        indices, blocks = self.intermediate_layers_indices, range(self.num_hidden_layers)
        if list(indices) != sorted({index for index in indices if index in blocks}):
            raise InputError(
                f"intermediate_layers_indices is {list(indices)}: expected numbers of blocks in ascending "
                f"order, from 0 to {self.num_hidden_layers - 1}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of a tile, with its class token."""
        return self.num_patches + 1

    @property
    def output_size(self) -> int:
        """Numbers of a token at the end: D for the last state, and D for each one that is kept."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @property
    def canvases(self) -> list[Canvas]:
        """Rows and columns of tiles for each of the `aspect_ratio_ids`, which count from 1."""
        return supported_canvases(self.max_num_tiles)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaVisionTowerConfig:
        """From the `vision_config` part of a config.json.

        Raises InputError: another tower, other aspect ratios, or another width of the output.
        """
        expect(values, "vision_config", "model_type", "mllama_vision_model")
        found = known(cls, values)
        if "intermediate_layers_indices" in found:
            found["intermediate_layers_indices"] = tuple(found["intermediate_layers_indices"])
        config = cls(**found)
        ratios = values.get("supported_aspect_ratios") or [list(canvas) for canvas in config.canvases]
        expect(
            {"supported_aspect_ratios": [list(ratio) for ratio in ratios]},
            "vision_config",
            "supported_aspect_ratios",
            [list(canvas) for canvas in config.canvases],
        )
        expect(values, "vision_config", "vision_output_dim", config.output_size)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {
            "model_type": "mllama_vision_model",
            **asdict(self),
            "intermediate_layers_indices": list(self.intermediate_layers_indices),
            "supported_aspect_ratios": [list(canvas) for canvas in self.canvases],
            "vision_output_dim": self.output_size,
        }


class TileEmbedding(nn.Module):
    """A learned vector for each tile of each canvas, through a gate. Row 0 of the table is for no picture."""

    def __init__(self, config: LlamaVisionTowerConfig) -> None:
        super().__init__()
        self.tiles = config.max_num_tiles
        self.embedding = nn.Embedding(1 + len(config.canvases), self.tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, aspect_ratio_ids: Tensor) -> Tensor:
        """[M] -> [M, T, 1, D], for all tokens of a tile."""
        return self.gate.tanh() * self.embedding(aspect_ratio_ids).unflatten(-1, (self.tiles, 1, -1))


class TileEmbeddings(nn.Module):
    """Patches, a class token before those of each tile, and positions.

    A gate moves from positions inside of a tile, CLIP's, to those of the whole canvas.
    """

    def __init__(self, config: LlamaVisionTowerConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=patch, stride=patch, bias=False
        )
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.pre_tile_embedding = TileEmbedding(config)
        self.position_embedding = nn.Embedding(config.num_tokens, width)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)
        self.tile_position_embedding = nn.Embedding(
            1 + len(config.canvases), config.max_num_tiles * config.num_tokens * width
        )
        self.position_gate = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Tiles [M, T, C, height, width], ids [M] -> [M, T, 1 + N, D]."""
        tiles = pixel_values.shape[:2]
        patches = self.patch_embedding(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        patches = patches.unflatten(0, tiles) + self.pre_tile_embedding(aspect_ratio_ids)  # [M, T, N, D]
        first = self.class_embedding.expand(*tiles, 1, -1)
        x = torch.cat([first, patches], dim=2)
        gate, on_canvas = self.position_gate.tanh(), self.tile_position_embedding(aspect_ratio_ids)
        return x + (1 - gate) * self.position_embedding.weight + gate * on_canvas.view_as(x)


class TileBlock(nn.Module):
    """Pre-norm block without biases in its attention. `post_attention_layernorm` comes before the MLP."""

    def __init__(self, config: LlamaVisionTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = Attention(width, config.attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [M, S, D], of all tiles -> [M, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), mask)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GatedTileBlock(TileBlock):
    """The same with a gate for each branch."""

    def __init__(self, config: LlamaVisionTowerConfig) -> None:
        super().__init__(config)
        self.gate_attn = nn.Parameter(torch.zeros(1))
        self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [M, S, D], of all tiles -> [M, S, D]."""
        x = x + self.gate_attn.tanh() * self.self_attn(self.input_layernorm(x), mask)
        x = x + self.gate_ffn.tanh() * self.mlp(self.post_attention_layernorm(x))
        return x


class LlamaVisionTower(nn.Module):
    """The whole tower.

    >>> tower = LlamaVisionTower(LlamaVisionTowerConfig())
    >>> tower(torch.randn(1, 4, 3, 448, 448), torch.tensor([2])).shape  # 1 x 2 tiles
    torch.Size([1, 4, 1025, 7680])
    """

    def __init__(self, config: LlamaVisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TileEmbeddings(config)
        self.layernorm_pre = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.layers = nn.ModuleList(TileBlock(config) for _ in range(config.num_hidden_layers))
        self.layernorm_post = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.post_tile_embedding = TileEmbedding(config)
        self.global_layers = nn.ModuleList(GatedTileBlock(config) for _ in range(config.num_global_layers))

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """Tiles of M pictures, with zeros for those that a canvas does not have -> their tokens.

        Args:
            pixel_values: [M, T, C, height, width].
            aspect_ratio_ids: [M], the canvas of each picture, from 1.

        Returns:
            [M, T, 1 + N, 6 * D]; what it says of missing tiles is not to be read.
        Raises:
            InputError: another number or size of tiles, or ids of no canvas.
        """
        self.check(pixel_values, aspect_ratio_ids)
        x = self.layernorm_pre(self.embeddings(pixel_values, aspect_ratio_ids))
        x = F.pad(x, (0, 0, 0, -x.shape[2] % MULTIPLE))  # [M, T, n, D]
        tiles, n = x.shape[1:3]
        is_token = torch.arange(n, device=x.device) < self.config.num_tokens
        is_real = (self.real_tiles(aspect_ratio_ids)[..., None] & is_token).flatten(1)  # [M, T * n]
        mask = additive((is_real[:, :, None] | is_real[:, None, :])[:, None], x.dtype)

        x = x.flatten(1, 2)
        kept = []
        for number, layer in enumerate(self.layers):
            if number in self.config.intermediate_layers_indices:
                kept.append(x)
            x = layer(x, mask)
        x = self.layernorm_post(x).unflatten(1, (tiles, n)) + self.post_tile_embedding(aspect_ratio_ids)
        x = x.flatten(1, 2)
        for layer in self.global_layers:
            x = layer(x, mask)
        if kept:
            x = torch.cat([x, torch.stack(kept, dim=-1).flatten(-2)], dim=-1)
        return x.unflatten(1, (tiles, n))[:, :, : self.config.num_tokens]

    def num_tiles(self, aspect_ratio_ids: Tensor) -> Tensor:
        """How many tiles each picture has: [M] -> [M]."""
        counts = [0, *(rows * columns for rows, columns in self.config.canvases)]
        return torch.tensor(counts, device=aspect_ratio_ids.device)[aspect_ratio_ids]

    def real_tiles(self, aspect_ratio_ids: Tensor) -> Tensor:
        """Which tiles a picture has: [M] -> boolean [M, T]."""
        numbers = torch.arange(self.config.max_num_tiles, device=aspect_ratio_ids.device)
        return numbers < self.num_tiles(aspect_ratio_ids)[:, None]

    def check(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> None:
        """Raise InputError unless pictures are tiles of the right size on canvases that are known."""
        config = self.config
        expected = [config.max_num_tiles, config.num_channels, config.image_size, config.image_size]
        if list(pixel_values.shape[1:]) != expected:
            raise InputError(
                f"pixel_values has shape {list(pixel_values.shape)}, expected [pictures, "
                f"{str(expected)[1:]}: as many tiles as the model has places for; prepare the pictures with "
                "the processor from its folder"
            )
        if aspect_ratio_ids.shape != pixel_values.shape[:1]:
            raise InputError(
                f"aspect_ratio_ids has shape {list(aspect_ratio_ids.shape)}, and there are "
                f"{len(pixel_values)} pictures: give one number for each"
            )
        last = len(config.canvases)
        if bool(((aspect_ratio_ids < 1) | (aspect_ratio_ids > last)).any()):
            raise InputError(
                f"aspect_ratio_ids are {aspect_ratio_ids.tolist()}: expected numbers from 1 to {last}, for "
                f"the canvases {', '.join(f'{rows} x {columns}' for rows, columns in config.canvases)}"
            )
