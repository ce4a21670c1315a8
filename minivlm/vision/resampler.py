"""Flamingo's perceiver resampler (https://arxiv.org/abs/2204.14198): any number of patches becomes n vectors.

    patches of all frames ----┐
                              ├-> keys, values -┐
    latents ------------------┤                 ├-> attention -> + -> MLP -> + -> latents, `depth` times
                              └-> queries ------┘

The latents are learned vectors that ask the patches, and each other, what is in the picture. What differs
from the probe in pooling.py: there are n of them, in several layers, and they are part of their own keys and
of the result; nothing has a bias. So a long video costs the decoder no more than a picture. Nothing here says
where a patch lies: the tower has to. Two tables may say which frame of a video it is from, and which picture
of a text.

The formula is that of OpenFlamingo (https://github.com/mlfoundations/open_flamingo), with GELU. The paper has
squared ReLU in its place (appendix A.1.4); the resampler of Idefics in transformers has ReLU, and optional
norms of queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlm.attention import attend
from minivlm.errors import InputError


class CrossAttention(nn.Module):
    """Queries of one kind, keys and values of another, of any widths; no biases."""

    def __init__(self, query_size: int, key_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(query_size, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(key_size, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, query_size, bias=False)

    def look(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [B, T, D_query], keys [B, S, D_key], mask as in `attend` -> [B, T, D_query]."""
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for x in (self.to_q(queries), *self.to_kv(keys).chunk(2, dim=-1))
        )  # [B, H, T or S, Dh]
        out = attend(q, k, v, mask, self.head_dim**-0.5)
        return self.to_out(out.transpose(1, 2).flatten(2))  # [B, H, T, Dh] -> [B, T, D_query]


def feed_forward(hidden_size: int) -> nn.Sequential:
    """A norm, then an MLP that is four times as wide inside and has no biases."""
    return nn.Sequential(
        nn.LayerNorm(hidden_size),
        nn.Linear(hidden_size, 4 * hidden_size, bias=False),
        nn.GELU(),
        nn.Linear(4 * hidden_size, hidden_size, bias=False),
    )


class PerceiverAttention(CrossAttention):
    """Latents look at the picture and at all latents, in one softmax."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__(hidden_size, hidden_size, num_heads, head_dim)
        self.norm_media = nn.LayerNorm(hidden_size)
        self.norm_latents = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """The picture [B, S, D], latents [B, n, D] -> [B, n, D]."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        return self.look(latents, torch.cat([x, latents], dim=1))


class ResamplerBlock(nn.Module):
    """Pre-norm block: the norms are in its parts."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn = PerceiverAttention(hidden_size, num_heads, head_dim)
        self.ff = feed_forward(hidden_size)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """The picture [B, S, D], latents [B, n, D] -> [B, n, D]."""
        latents = latents + self.attn(x, latents)
        latents = latents + self.ff(latents)
        return latents


class PerceiverResampler(nn.Module):
    """Pictures or videos of any size -> n vectors each.

    >>> PerceiverResampler(768)(torch.randn(2, 1, 196, 768)).shape
    torch.Size([2, 64, 768])

    Args:
        max_num_media: embeddings for the place of a picture among those of its text; 0 for none.
        max_num_frames: embeddings for the frames of a video; 0 for none.
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 64,
        max_num_media: int = 0,
        max_num_frames: int = 0,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))
        self.media_time_embs = _table(max_num_media, 1, hidden_size)
        self.frame_embs = _table(max_num_frames, hidden_size)
        self.layers = nn.ModuleList(ResamplerBlock(hidden_size, num_heads, head_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, media_times: Tensor | None = None) -> Tensor:
        """Patches of the F frames of M pictures or videos [M, F, N, D] -> [M, n, D].

        Args:
            media_times: [M], the place of each among those of its text, from 0; None: each is the first.

        Raises InputError: a frame or a place has no embedding.
        """
        if self.frame_embs is not None:
            _require("frames in a video", x.shape[1], "max_num_frames", len(self.frame_embs))
            x = x + self.frame_embs[: x.shape[1], None]
        x = x.flatten(1, 2)  # [M, F * N, D]
        if self.media_time_embs is not None:
            if media_times is None:
                media_times = torch.zeros(len(x), dtype=torch.long, device=x.device)
            places = int(media_times.max()) + 1 if len(x) else 0
            _require("pictures in a row of text", places, "max_num_media", len(self.media_time_embs))
            x = x + self.media_time_embs[media_times]
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm(latents)


def _table(rows: int, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(rows, *shape)) if rows else None


def _require(what: str, number: int, name: str, most: int) -> None:
    if number > most:
        raise InputError(
            f"there are {number} {what}, and the resampler has embeddings for {most} ({name}): leave some out"
        )
