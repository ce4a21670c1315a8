"""YaRN (https://arxiv.org/abs/2309.00071): rotary positions for a longer context, as in DeepSeek-V2.

As in llama3_rope.py, pairs that turn slowly are slowed down further, those that turn fast are left alone,
and those in between are mixed. Two things differ: the mixing goes by the number of a pair, from the last that
turns `beta_fast` times in the old context to the first that turns `beta_slow` times; and attention is made
sharper, since a softmax over more keys is flatter:

    scores * m(mscale_all_dim)^2, and queries and keys * m(mscale) / m(mscale_all_dim),
    with m(s) = 0.1 s ln(factor) + 1

The second is 1 in DeepSeek's files, where both scales are equal.
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
class YarnScaling:
    """The defaults are those of DeepSeek's own program."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.factor < 1 or not 0 < self.beta_slow < self.beta_fast:
            raise InputError(
                f"rope_scaling has factor {self.factor}, beta_fast {self.beta_fast} and beta_slow "
                f"{self.beta_slow}: expected a factor of at least 1, and beta_slow below beta_fast"
            )

    @property
    def score_factor(self) -> float:
        """How much larger the scores of attention become."""
        return self._m(self.mscale_all_dim) ** 2

    @property
    def angle_factor(self) -> float:
        """How much longer rotated queries and keys become."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> YarnScaling | None:
        """From the `rope_scaling` of a config.json; without one, None.

        Raises InputError: another kind of scaling, or a setting that is not computed here.
        """
        if not values:
            return None
        kind = values.get("rope_type", values.get("type"))
        if kind != "yarn":
            raise InputError(f"rope_scaling has type = {kind!r}; only 'yarn', or none, is supported here")
        names = {*cls.__dataclass_fields__, "type", "rope_type", "rope_theta"}
        others = [name for name in values if name not in names]
        if others:
            raise InputError(
                f"rope_scaling has {others[0]} = {values[others[0]]!r}, which is not supported here: take it "
                "out if the model was trained without"
            )
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The same part of a config.json."""
        return {"type": "yarn", **asdict(self)}


def yarn_angles(
    position_ids: Tensor, head_dim: int, theta: float, scaling: YarnScaling
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, as `minivlm.rope.rotary_angles`: [B, T] -> [B, 1, T, Dh], fp32."""

    def pair_with(turns: float) -> float:
        """The number of the pair that turns so often in the old context, from the fastest on."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    frequencies = theta**-exponents  # [Dh / 2]
    numbers = torch.arange(head_dim // 2, device=position_ids.device)
    slowed = ((numbers - first) / ((last - first) or 0.001)).clamp(0, 1)
    frequencies = frequencies * (1 - slowed) + frequencies / scaling.factor * slowed
    angles = position_ids[:, None, :, None].float() * frequencies  # [B, 1, T, Dh / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scaling.angle_factor, angles.sin() * scaling.angle_factor
