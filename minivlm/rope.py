"""Rotary position embedding (RoPE, https://arxiv.org/abs/2104.09864) as pure functions.

A head's vector is read as pairs of numbers, and each pair is rotated by an angle proportional to the token's
position. The dot product of two rotated vectors then depends only on the difference of their positions:
shifting all positions by the same amount changes nothing, so positions may start anywhere.

The pairs are half-split, as in Gemma and Llama checkpoints: the partner of element i is element i + Dh/2. The
paper pairs neighbors (2i, 2i + 1). The two differ by a fixed permutation of the rows of q_proj and k_proj, so
each is right only for weights that were trained with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle.

    Args:
        position_ids: [B, T] integers.
        head_dim: width Dh of one head.
        theta: base of the geometric series of wavelengths, from 2 pi to nearly 2 pi theta positions.

    Returns:
        cos, sin: [B, 1, T, Dh] in fp32; the axis of size 1 broadcasts over heads.
    """
    # fp32 whatever the model's dtype: bf16 cannot tell position 256 from 257.
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents  # [B, 1, T, Dh / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of the last axis: a quarter turn of every pair."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys x [B, H, T, Dh] by their angles; the dtype of x is kept."""
    return x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype)
