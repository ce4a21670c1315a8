"""Running fast: what is put on a loaded model from outside, and changes results by rounding at most.

`speed_up` is what every loaded model gets. The rest is chosen: int8.py, packing.py, compiled.py.
"""

from __future__ import annotations

from torch import nn

from minivlm.layers import MLP, GatedMLP
from minivlm.speed.last_token import skip_unread
from minivlm.speed.one_row import OneRowLinear, TiedHead
from minivlm.speed.pieces import GatedMLPInPieces, MLPInPieces
from minivlm.speed.replacing import replace_modules

__all__ = ["speed_up"]


def speed_up(model: nn.Module) -> nn.Module:
    """MLPs in pieces, one row at the speed of memory, and nothing computed that nobody reads.

    The model that comes back takes the place of the one given. It can be trained and saved like that one.
    """
    replace_modules(model, {MLP: MLPInPieces, GatedMLP: GatedMLPInPieces, nn.Linear: OneRowLinear})
    for module in list(model.modules()):
        table = getattr(module, "embed_tokens", None)
        if type(table) is nn.Embedding and getattr(module, "lm_head", table) is None:
            module.lm_head = TiedHead(table)
    return skip_unread(model)
