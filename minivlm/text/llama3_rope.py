"""Rotary positions for a longer context, as in Llama 3.1 and 3.2 (https://arxiv.org/abs/2407.21783).

A model that was trained on 8,192 positions has never seen its slow pairs turn far. For 16 times as many, they
are slowed down, so that they stay where they were trained; fast pairs, which tell neighbors apart, are left
alone; those in between are mixed:

    turns in 8,192 positions    ... 16  8 | 4 ... 1 | .5  .25 ...
    frequency                   as it was | between | an 8th

transformers calls it `rope_type: "llama3"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.configs import check_types, known
from minivlm.errors import InputError


@dataclass(frozen=True)
class Llama3Scaling:
    """The defaults are those of Llama 3.1 and of Llama 3.2 Vision."""

    factor: float = 8.0
    low_freq_factor: float = 1.0  # turns in the old context, below which a pair is slowed down
    high_freq_factor: float = 4.0  # and above which it is left alone
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor < 1:
            raise InputError(
                f"rope_scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} and "
                f"high_freq_factor {self.high_freq_factor}: expected a factor of at least 1, and the lower "
                "one below the higher"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Llama3Scaling:
        """From the `rope_scaling` or `rope_parameters` of a config.json."""
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The same part of a config.json."""
        return {"rope_type": "llama3", **asdict(self)}


def llama3_angles(
    position_ids: Tensor, head_dim: int, theta: float, scaling: Llama3Scaling
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, as `minivlm.rope.rotary_angles`: [B, T] -> [B, 1, T, Dh], fp32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    frequencies = theta**-exponents  # [Dh / 2]
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    angles = position_ids[:, None, :, None].float() * frequencies  # [B, 1, T, Dh / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
