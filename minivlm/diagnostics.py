"""Numbers that tell whether a tower has collapsed, before any answer does."""

from __future__ import annotations

import torch
from torch import Tensor


def within_picture_share(tokens: Tensor) -> float:
    """How much of an image tower's output tells patches of one picture apart, from 0 to 1.

    The energy of the tokens, the mean of their squares, is made of what all pictures share, of what tells
    pictures apart, and of what tells the patches of one picture apart. A decoder that has to point at
    things lives on the last part. A collapsed tower gives a few hundredths: every patch says the same.

    Args:
        tokens: [P, N, D], the tower's output for P pictures.
    """
    tokens = tokens.double()
    within = (tokens - tokens.mean(dim=1, keepdim=True)).square().mean()
    return float(within / tokens.square().mean().clamp_min(torch.finfo(torch.float64).tiny))
