"""Qwen2.5-VL's image tower (https://arxiv.org/abs/2502.13923, section 2.1.1): most blocks look in windows.

Differences from Qwen2-VL's tower in `qwen2_vl.py`: RMSNorm in place of LayerNorm, SwiGLU in place of a plain
MLP, and in all but a few blocks a patch sees those of its window alone, 8 x 8 patches in published models. So
the cost of a block grows with the area of a picture, not with its square. The few blocks with full attention
carry what is seen from window to window.

Windows are segments of the row, so tokens of one window have to be neighbors: they are put in that order
before the first block, together with their angles, and put back after the merger.

    picture of 3 x 5 tokens, windows of 2 x 2:     a a b b c
                                                   a a b b c   ->   a a a a b b b b c c d d e e f
                                                   d d e e f
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.configs import check_types, expect
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary
from minivlm.vision.qwen2_vl import (
    EPS,
    PatchEmbeddings,
    PatchMerger,
    SegmentAttention,
    check_grids,
    check_rotated,
    frames_of,
    grid_angles,
    grid_positions,
    known_tower,
    maps_of_tokens,
)


@dataclass(frozen=True)
class Qwen2_5_VLVisionConfig:
    """Qwen2.5-VL's image tower. The defaults are those of transformers; published towers are 1280 wide."""

    depth: int = 32
    hidden_size: int = 3584
    out_hidden_size: int = 3584  # of the decoder
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14  # pixels, height = width
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches on a side of an image token
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks without windows
    tokens_per_second: int = 4  # positions in time

    def __post_init__(self) -> None:
        check_types(self)
        check_rotated(self.hidden_size, self.num_heads)
        if self.window < 1:
            raise InputError(
                f"window_size is {self.window_size} pixels, and an image token has "
                f"{self.patch_size * self.spatial_merge_size}: choose larger windows"
            )

    @property
    def window(self) -> int:
        """Image tokens on a side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2_5_VLVisionConfig:
        """From the `vision_config` part of a config.json. Raises InputError: not Qwen2.5-VL's tower."""
        expect(values, "vision_config", "hidden_act", "silu")
        found = known_tower(cls, values, ("qwen2_5_vl", "qwen2_5_vl_vision"))
        if isinstance(found.get("fullatt_block_indexes"), list):
            found["fullatt_block_indexes"] = tuple(found["fullatt_block_indexes"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        values = {**asdict(self), "fullatt_block_indexes": list(self.fullatt_block_indexes)}
        return {"model_type": "qwen2_5_vl", **values, "in_chans": self.in_channels, "hidden_act": "silu"}


def by_windows(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[int]]:
    """The image tokens of pictures [M, 3] window by window, and how many each window has.

    At the right and at the bottom, windows are smaller.
    """
    cells: list[Tensor] = []
    start = 0  # the first token of a frame
    for steps, rows, columns in grid_thw.tolist():
        rows, columns = rows // merge_size, columns // merge_size
        for _ in range(steps):
            frame = torch.arange(start, start + rows * columns).view(rows, columns)
            cells += [cell.flatten() for band in frame.split(window) for cell in band.split(window, dim=1)]
            start += rows * columns
    return torch.cat(cells).to(grid_thw.device), [len(cell) for cell in cells]


class SwiGLUWithBiases(SwiGLU):
    """SwiGLU, in which all three layers have biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)


class Qwen2_5_VLVisionBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LlamaRMSNorm(config.hidden_size, EPS)
        self.self_attn = SegmentAttention(config.hidden_size, config.num_heads)
        self.layer_norm2 = LlamaRMSNorm(config.hidden_size, EPS)
        self.mlp = SwiGLUWithBiases(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, segments: list[int], rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """x [1, P, D] -> [1, P, D]."""
        x = x + self.self_attn.in_segments(self.layer_norm1(x), segments, rotary)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Qwen2_5_VLVisionModel(nn.Module):
    """The whole tower.

    >>> model = Qwen2_5_VLVisionModel(Qwen2_5_VLVisionConfig(depth=2, hidden_size=1280))
    >>> model(torch.randn(28, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 6], [1, 2, 2]])).shape
    torch.Size([7, 3584])
    """

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        patch = config.patch_size, config.temporal_patch_size
        self.embeddings = PatchEmbeddings(config.in_channels, width, *patch)
        self.layers = nn.ModuleList(Qwen2_5_VLVisionBlock(config) for _ in range(config.depth))
        norm = LlamaRMSNorm(width, EPS)
        self.merger = PatchMerger(norm, width, config.out_hidden_size, config.spatial_merge_size)

    @property
    def token_size(self) -> int:
        """Pixels of the picture for each image token, height = width."""
        return self.config.patch_size * self.config.spatial_merge_size

    def token_maps(self, maps: list[Tensor], grid_thw: Tensor) -> list[Tensor]:
        """Attention maps of one picture, as recorded -> one for each layer, among tokens: [1, H, N, N]."""
        config, waiting = self.config, iter(maps)
        order, windows = by_windows(grid_thw, config.spatial_merge_size, config.window)
        back, found = order.argsort(), []
        for number in range(config.depth):
            parts = 1 if number in config.fullatt_block_indexes else len(windows)
            layer = maps_of_tokens(list(islice(waiting, parts)), config.spatial_merge_size**2)
            found.append(layer[:, :, back][..., back])
        return found

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches of all pictures and videos -> image tokens.

        Args:
            pixel_values: [P, C * T * P * P].
            grid_thw: [M, 3], how many steps, rows and columns of patches each has.

        Returns:
            [P / merge_size^2, D], in the decoder's width.
        Raises:
            ValueError: patches of another size, or another number of them than in the grids.
        """
        config, merge_size = self.config, self.config.spatial_merge_size
        x = self.embeddings(pixel_values)  # [P, D]
        check_grids(grid_thw, len(pixel_values), merge_size)
        order, tokens = by_windows(grid_thw, merge_size, config.window)
        merged = merge_size**2  # patches of a token, which stay together
        cos, sin = grid_angles(grid_positions(grid_thw, merge_size), config.hidden_size // config.num_heads)
        x, cos, sin = (part.unflatten(0, (-1, merged))[order].flatten(0, 1) for part in (x, cos, sin))
        rotary = partial(apply_rotary, cos=cos.to(x.dtype), sin=sin.to(x.dtype))
        frames, windows = frames_of(grid_thw), [merged * count for count in tokens]
        x = x[None]  # [1, P, D]
        for number, layer in enumerate(self.layers):
            x = layer(x, frames if number in config.fullatt_block_indexes else windows, rotary)
        return self.merger(x[0])[order.argsort()]
