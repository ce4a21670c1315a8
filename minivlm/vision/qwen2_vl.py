"""Qwen2-VL's image tower (https://arxiv.org/abs/2409.12191, section 2.1): pictures of any size, no padding.

    picture 1: 4 x 6 patches ┐                                          ┌ 2 x 3 image tokens
    picture 2: 2 x 2 patches ┼-> one row of patches -> blocks -> merger ┼ 1 x 1
    video: T frames          ┘                                          └ T x ...

Differences from SigLIP's tower: all patches of all pictures stand in one row, and each looks only at those of
its own picture, or of its own frame in a video (attention in segments: no mask, no padding). Nothing is
learned about positions: a head's vector is turned by the patch's row and column, so any grid will do. At the
end, the merger makes one image token of each 2 x 2 patches. They stand next to each other in the row
(processing/patches.py puts them there), so merging is a change of shape.

A patch is two frames deep: a video has half as many steps as frames, and a picture is shown twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, attend
from minivlm.configs import check_activation, check_types, check_width, expect, known, part_of
from minivlm.errors import InputError
from minivlm.layers import MLP
from minivlm.rope import apply_rotary

EPS = 1e-6  # of all norms
THETA = 10000.0  # base of the wavelengths of rotary positions


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Qwen2-VL's image tower. The defaults are those of transformers: 7B."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584  # of the decoder
    num_heads: int = 16
    mlp_ratio: float = 4
    hidden_act: str = "quick_gelu"
    in_channels: int = 3
    patch_size: int = 14  # pixels, height = width
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches on a side of an image token

    def __post_init__(self) -> None:
        check_types(self)
        check_activation(self.hidden_act)
        check_rotated(self.embed_dim, self.num_heads)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2VLVisionConfig:
        """From the `vision_config` part of a config.json. Raises InputError: not Qwen2-VL's tower."""
        return cls(**known_tower(cls, values, ("qwen2_vl", "qwen2_vl_vision")))

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {"model_type": "qwen2_vl", **asdict(self), "in_chans": self.in_channels}


def known_tower(cls: type, values: Mapping[str, Any], model_types: Sequence[str]) -> dict[str, Any]:
    """The fields of a tower in its part of a config.json.

    Raises InputError: another system's tower, or rotary positions of another kind.
    """
    if values.get("model_type", model_types[0]) not in model_types:  # published files have the first
        raise InputError(f"vision_config has model_type = {values['model_type']!r}; only {model_types[0]!r} "
                         "is supported here")  # fmt: skip
    rope = part_of(values, "rope_parameters")
    expect(rope, "vision_config.rope_parameters", "rope_type", "axial")
    expect(rope, "vision_config.rope_parameters", "rope_theta", THETA)
    # Published files say in_chans, which transformers does not read: it takes its default.
    return known(cls, {**values, "in_channels": values.get("in_channels") or values.get("in_chans")})


def check_rotated(hidden_size: int, num_heads: int) -> None:
    """Raise InputError unless a head's vector can be divided into pairs for rows and pairs for columns."""
    check_width(hidden_size, num_heads)
    if hidden_size // num_heads % 4:
        raise InputError(
            f"a head is {hidden_size // num_heads} wide, and half of its pairs turn with the row, half with "
            "the column: choose a multiple of 4"
        )


def grid_positions(grid_thw: Tensor, merge_size: int) -> Tensor:
    """Row and column of each patch, in the order of the patches: grids [M, 3] -> [P, 2].

    Patches that become one image token are neighbors, so a row of 4 x 4 patches begins

        (0, 0) (0, 1) (1, 0) (1, 1)   (0, 2) (0, 3) (1, 2) (1, 3)   (2, 0) ...
    """
    found = []
    for frames, rows, columns in grid_thw.tolist():
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        tokens = rows // merge_size, merge_size, columns // merge_size, merge_size, 2
        places = places.view(tokens).transpose(1, 2).reshape(-1, 2)
        found.append(places.repeat(frames, 1))
    return torch.cat(found).to(grid_thw.device)


def grid_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, for positions of two axes.

    Each axis has the same Dh / 4 frequencies, and turns pairs of its own: angles are [rows, columns, rows,
    columns], the second half for the partners of the first (see `minivlm.rope`).

    Args:
        positions: [P, 2].

    Returns:
        cos, sin: [P, Dh] in fp32.
    """
    exponents = torch.arange(0, head_dim // 2, 2, device=positions.device).float() / (head_dim // 2)
    angles = (positions[..., None].float() * THETA**-exponents).flatten(1)  # [P, Dh / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def frames_of(grid_thw: Tensor) -> list[int]:
    """How many patches each frame has: grids [M, 3] -> one number for each of their frames."""
    return [rows * columns for frames, rows, columns in grid_thw.tolist() for _ in range(frames)]


class SegmentAttention(Attention):
    """Attention in one long row, where each token sees those of its own segment.

    The same as a block-diagonal mask (`minivlm.masks.block_diagonal`), without computing what it hides.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads, bias=True)

    def in_segments(self, x: Tensor, segments: list[int], rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """x [1, P, D] and the lengths of its segments, whose sum is P -> [1, P, D]."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        parts = (heads.split(segments, dim=2) for heads in (rotary(q), rotary(k), v))
        out = torch.cat([attend(q, k, v, None, self.scale) for q, k, v in zip(*parts, strict=True)], dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [1, H, P, Dh] -> [1, P, D]


class Qwen2VLVisionBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = SegmentAttention(width, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.hidden_act)

    def forward(self, x: Tensor, segments: list[int], rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """x [1, P, D] -> [1, P, D]."""
        x = x + self.self_attn.in_segments(self.layer_norm1(x), segments, rotary)
        x = x + self.mlp(self.layer_norm2(x))
        return x


class PatchEmbeddings(nn.Module):
    """Projects each patch to a vector."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int, temporal_patch_size: int) -> None:
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        self.patch_embedding = nn.Conv3d(in_channels, hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [P, C * T * P * P], already cut into patches -> [P, D].

        Raises ValueError: patches of another size.
        """
        weight = self.patch_embedding.weight.flatten(1)  # where patches do not overlap, a matrix is enough
        if pixel_values.dim() != 2 or pixel_values.shape[1] != weight.shape[1]:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}, expected [patches, {weight.shape[1]}]: "
                "prepare the pictures with the processor from the model's folder"
            )
        return F.linear(pixel_values.to(weight.dtype), weight)


class PatchMerger(nn.Module):
    """One image token, in the decoder's width, of each merge_size x merge_size patches."""

    def __init__(self, norm: nn.Module, hidden_size: int, out_size: int, merge_size: int) -> None:
        super().__init__()
        self.merged_size = hidden_size * merge_size**2
        self.norm = norm
        self.fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.fc2 = nn.Linear(self.merged_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, D_image] -> [P / merge_size^2, D]."""
        x = self.norm(x).view(-1, self.merged_size)  # neighbors in the row
        return self.fc2(F.gelu(self.fc1(x)))


class Qwen2VLVisionModel(nn.Module):
    """The whole tower.

    >>> model = Qwen2VLVisionModel(Qwen2VLVisionConfig(depth=2))
    >>> model(torch.randn(28, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 6], [1, 2, 2]])).shape
    torch.Size([7, 3584])
    """

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        patch = config.patch_size, config.temporal_patch_size
        self.embeddings = PatchEmbeddings(config.in_channels, width, *patch)
        self.layers = nn.ModuleList(Qwen2VLVisionBlock(config) for _ in range(config.depth))
        norm = nn.LayerNorm(width, eps=EPS)
        self.merger = PatchMerger(norm, width, config.hidden_size, config.spatial_merge_size)

    @property
    def token_size(self) -> int:
        """Pixels of the picture for each image token, height = width."""
        return self.config.patch_size * self.config.spatial_merge_size

    def token_maps(self, maps: list[Tensor], grid_thw: Tensor) -> list[Tensor]:
        """Attention maps of one picture, as recorded -> one for each layer, among tokens: [1, H, N, N]."""
        return [maps_of_tokens([layer], self.config.spatial_merge_size**2) for layer in maps]

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
        x = self.embeddings(pixel_values)[None]  # [1, P, D]
        check_grids(grid_thw, len(pixel_values), self.config.spatial_merge_size)
        positions = grid_positions(grid_thw, self.config.spatial_merge_size)
        cos, sin = grid_angles(positions, self.config.embed_dim // self.config.num_heads)
        rotary = partial(apply_rotary, cos=cos.to(x.dtype), sin=sin.to(x.dtype))
        segments = frames_of(grid_thw)
        for layer in self.layers:
            x = layer(x, segments, rotary)
        return self.merger(x[0])


def maps_of_tokens(maps: Sequence[Tensor], merged: int) -> Tensor:
    """Attention maps [1, H, n, n] of the segments of one row -> one among image tokens [1, H, N, N].

    A token looks where its patches look, on average; outside of its segment, nowhere. `merged` patches that
    follow each other are one token.
    """
    heads = [torch.block_diag(*(part[0, head] for part in maps)) for head in range(maps[0].shape[1])]
    whole = torch.stack(heads)[None]  # [1, H, P, P]
    return whole.unflatten(2, (-1, merged)).mean(dim=3).unflatten(3, (-1, merged)).sum(dim=4)


def check_grids(grid_thw: Tensor, patches: int, merge_size: int) -> None:
    """Raise ValueError unless these grids [M, 3] can be merged, and have so many patches together."""
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or bool((grid_thw[:, 1:] % merge_size != 0).any()):
        raise ValueError(
            f"grid_thw is {grid_thw.tolist()}, expected [steps, rows, columns] of each picture, the last two "
            f"divisible by {merge_size}"
        )
    expected = int(grid_thw.prod(dim=1).sum())
    if patches != expected:
        raise ValueError(
            f"pixel_values hold {patches} patches, and the grids {grid_thw.tolist()} have {expected}: let "
            "the processor build both"
        )
