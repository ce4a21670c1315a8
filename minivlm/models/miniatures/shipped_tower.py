"""Folders that leave their image tower out, since it is the one that ships with the package.

Published checkpoints of systems with a frozen tower do the same: LLaVA's own say where it is to be taken from
as `mm_vision_tower`, and OpenFlamingo's hold nothing but what was trained. Here the name ends with a
checksum of the weights, so that a folder is never joined with a tower of a later version.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import SHIPPED, read_config
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS, to_ours
from minivlm.configs import part_of
from minivlm.errors import InputError
from minivlm.vision.siglip import SiglipVisionConfig

TOWER = "mm_vision_tower"  # in config.json
PREFIX = "vision_tower."  # of its weights


def left_out(folder: Path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the tower under our names, if the folder's config.json says that they are elsewhere.

    Raises InputError: they are in a place that is not known, or the config describes another tower.
    """
    if TOWER not in values:
        return {}
    shipped = shipped_weights()
    tower, own = (
        SiglipVisionConfig.from_dict(part_of(config, "vision_config"))
        for config in (read_config(SHIPPED), values)
    )
    if values[TOWER] != name_of(shipped) or tower != own:
        raise InputError(
            f"{folder} leaves its image tower out, and needs {values[TOWER]!r}; this version of minivlm has "
            f"{name_of(shipped)!r}: use the version that the folder was made with, or train it again"
        )
    return shipped


def name_of(tower: Mapping[str, Tensor]) -> str:
    """What a folder calls the shipped tower that it was trained with."""
    content = sha256()
    for name in sorted(tower):
        content.update(tower[name].float().numpy().tobytes())
    return f"minivlm/tiny@{content.hexdigest()[:12]}"


def shipped_weights() -> dict[str, Tensor]:
    """Those of the tower that ships with the package, under our names."""
    found = {
        to_ours(name, PALIGEMMA_LAYOUTS["hub"]): tensor
        for name, tensor in weights.read_tensors(SHIPPED).items()
    }
    return {name: tensor for name, tensor in found.items() if name is not None and name.startswith(PREFIX)}


def require_shipped(tower: nn.Module) -> str:
    """The name of a tower that is the shipped one, in whichever dtype. Raises InputError: it is not."""
    own, shipped = tower.state_dict(), shipped_weights()
    for name, tensor in shipped.items():
        other = own.get(name.removeprefix(PREFIX))
        if other is None or not torch.equal(other.cpu(), tensor.to(other.dtype)):
            raise InputError(f"the image tower is not the one in {SHIPPED}: save it with the rest")
    return name_of(shipped)
