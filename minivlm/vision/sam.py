"""SAM's image tower (https://arxiv.org/abs/2304.02643): a Vision Transformer for pictures of 1,024 pixels.

4,096 patches could all look at each other, but that is expensive. As in ViTDet
(https://arxiv.org/abs/2203.16527), they do so in four of twelve blocks. In the others, a patch sees its own
window of 14 x 14. Differences from SigLIP's tower:

- Tokens stay on their grid, [B, height, width, D]. 64 is no multiple of 14, so zeros are added below and to
  the right, after the norm. No mask hides them: they are keys and values like all others, made of the biases.
- Beside the learned vector of each position, every block has vectors for distances between rows, and for
  those between columns. Their products with the query are added to the scores (MViTv2, section 4.1,
  https://arxiv.org/abs/2112.01526). The scores are scaled before, the query in these products is not.
- GELU is the exact one, and no norm but a neck ends the tower: two convolutions, each with a norm over
  channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, attend
from minivlm.configs import check_activation, check_grid, check_types, check_width, expect, known
from minivlm.errors import InputError
from minivlm.layers import MLP
from minivlm.vision.pixels import check_pixels


@dataclass(frozen=True)
class SamVisionConfig:
    """SAM's tower (https://arxiv.org/abs/2304.02643). The defaults are SAM-B, the smallest."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 1024  # pixels, height = width
    patch_size: int = 16  # pixels, height = width
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    output_channels: int = 256  # of the neck
    window_size: int = 14  # patches, height = width
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)  # blocks without windows

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        check_grid(self.image_size, self.patch_size)
        last = self.num_hidden_layers - 1
        if not self.global_attn_indexes or not all(0 <= i <= last for i in self.global_attn_indexes):
            raise InputError(
                f"global_attn_indexes is {self.global_attn_indexes}: expected at least one, from 0 to {last}"
            )

    @property
    def side(self) -> int:
        """Patches in a row, and in a column."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamVisionConfig:
        """From the part of a config.json with SAM's tower.

        Raises InputError: another tower, or one without biases or without either kind of positions.
        """
        part = "high_res_vision_config"
        expect(values, part, "model_type", "sam_vision_model")
        for name in ("qkv_bias", "use_abs_pos", "use_rel_pos"):
            expect(values, part, name, True)
        found = known(cls, values)
        width = found.get("hidden_size", cls.hidden_size)
        # transformers reads `mlp_dim`, and no other name.
        found["intermediate_size"] = values.get("mlp_dim") or int(width * (values.get("mlp_ratio") or 4))
        if "global_attn_indexes" in found:
            found["global_attn_indexes"] = tuple(found["global_attn_indexes"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The part of a config.json with SAM's tower."""
        values = asdict(self)
        size = values.pop("intermediate_size")
        return {
            "model_type": "sam_vision_model",
            **values,
            "global_attn_indexes": list(self.global_attn_indexes),
            "mlp_dim": size,
            "mlp_ratio": size / self.hidden_size,
        }


def cut_into_windows(x: Tensor, size: int) -> Tensor:
    """[B, height, width, D] -> windows, row by row, [B * windows, size, size, D], with zeros where x ends."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [B, rows, size, columns, size, D]
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """The other way around: [B * windows, size, size, D] -> [B, height, width, D]; what was added is cut."""
    size = windows.shape[1]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # [B, rows, size, columns, size, D]
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def relative_scores(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """What distances add to the scores of a square of places, each with all.

    Args:
        q: [B, H, T, Dh], not scaled, T = side * side.
        rel_pos_h, rel_pos_w: [2 * side - 1, Dh], a vector for each distance of rows, and of columns, from
            key below (or right) by side - 1 to key above (or left) by side - 1.

    Returns:
        [B, H, T, T].
    """
    side = (len(rel_pos_h) + 1) // 2
    places = torch.arange(side, device=q.device)
    distances = places[:, None] - places + side - 1  # [query, key], from 0
    q = q.unflatten(2, (side, side))  # [B, H, side, side, Dh]
    by_row = torch.einsum("bhyxd,ykd->bhyxk", q, rel_pos_h[distances])
    by_column = torch.einsum("bhyxd,xkd->bhyxk", q, rel_pos_w[distances])
    return (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


class SamAttention(Attention):
    """Attention among the places of a square, with relative positions.

    Each head has an addition to the scores of its own, where `attend` takes one for each row of the batch. So
    each head is a row there, and a map is recorded as [B * H, 1, T, T].
    """

    def __init__(self, config: SamVisionConfig, side: int) -> None:
        super().__init__(config.hidden_size, config.num_attention_heads, bias=True)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))

    def in_squares(self, x: Tensor) -> Tensor:
        """x [B, side, side, D] -> [B, side, side, D]."""
        q, k, v = (self._heads(proj(x.flatten(1, 2))) for proj in (self.q_proj, self.k_proj, self.v_proj))
        added = relative_scores(q, self.rel_pos_h, self.rel_pos_w)
        q, k, v, added = (part.flatten(0, 1)[:, None] for part in (q, k, v, added))
        out = attend(q, k, v, added, self.scale)  # [B * H, 1, T, Dh]
        out = out.view(len(x), -1, *out.shape[2:])
        return self.o_proj(out.transpose(1, 2).flatten(2)).view_as(x)  # [B, H, T, Dh] -> [B, side, side, D]


class SamBlock(nn.Module):
    """Pre-norm block whose attention stays inside windows, or sees everything if `window_size` is None."""

    def __init__(self, config: SamVisionConfig, window_size: int | None) -> None:
        super().__init__()
        self.window_size = window_size
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SamAttention(config, window_size or config.side)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, height, width, D] -> [B, height, width, D]."""
        x = x + self.look_around(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x

    def look_around(self, x: Tensor) -> Tensor:
        """Attention: x [B, height, width, D] -> [B, height, width, D]."""
        if self.window_size is None:
            return self.self_attn.in_squares(x)
        windows = self.self_attn.in_squares(cut_into_windows(x, self.window_size))
        return join_windows(windows, *x.shape[1:3])


class SamNeck(nn.Module):
    """From the tower's width to few channels: 1 x 1, norm, 3 x 3, norm."""

    def __init__(self, config: SamVisionConfig) -> None:
        super().__init__()
        channels = config.output_channels
        self.conv1 = nn.Conv2d(config.hidden_size, channels, 1, bias=False)
        self.layer_norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.layer_norm2 = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, height, width, D] -> [B, C, height, width]."""
        x = self.layer_norm1(self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = self.layer_norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


class SamVisionModel(nn.Module):
    """The whole tower.

    >>> model = SamVisionModel(SamVisionConfig())
    >>> model(torch.randn(1, 3, 1024, 1024)).shape
    torch.Size([1, 256, 64, 64])
    """

    def __init__(self, config: SamVisionConfig) -> None:
        super().__init__()
        self.config = config
        size, side = config.patch_size, config.side
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.position_embedding = nn.Parameter(torch.zeros(1, side, side, config.hidden_size))
        self.layers = nn.ModuleList(
            SamBlock(config, None if number in config.global_attn_indexes else config.window_size)
            for number in range(config.num_hidden_layers)
        )
        self.neck = SamNeck(config)

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """The patch embeddings, then each block's output: num_hidden_layers + 1 tensors [B, side, side, D].

        Raises ValueError: the pictures do not have the config's size and channels.
        """
        check_pixels(pixel_values, self.config.num_channels, self.config.image_size)
        x = self.patch_embedding(pixel_values).permute(0, 2, 3, 1) + self.position_embedding
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width], normalized -> [B, output_channels, side, side]."""
        *_, last = self.hidden_states(pixel_values)
        return self.neck(last)
