"""Tensors that every version of PyTorch makes alike, so that numbers of another program can be stored.

Nothing here needs that program: a tensor depends on its name there, and on its shape.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor


def noise(*shape: int, start: float = 0.0) -> Tensor:
    """Numbers from -1 to 1 without a pattern."""
    count = torch.Size(shape).numel()
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + start) * 43758.5453
    return ((values % 1) * 2 - 1).float().view(shape)


def made_up(name: str, shape: torch.Size, norms: str = r"running_var$") -> Tensor:
    """The tensor of this name: in size by fan-in, weights of norms and variances around 1.

    Args:
        norms: a regular expression for names of tensors around 1, besides the weights of one dimension.
    """
    values = noise(*shape, start=float(sum(map(ord, name))))
    if re.search(norms, name) or (len(shape) == 1 and name.endswith("weight")):
        return 1 + 0.3 * values
    return values * (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.2 * values
