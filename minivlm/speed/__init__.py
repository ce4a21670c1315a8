"""Running fast: changes made to a loaded model from outside, which affect results by rounding at most.

Every loaded model gets `speed_up`. The rest is optional: int8.py, packing.py, compiled.py, and
chunked_loss.py for training.
"""

from __future__ import annotations

from torch import nn

from minivlm.layers import MLP, GatedMLP, SwiGLU
from minivlm.speed.last_token import skip_unread
from minivlm.speed.one_row import OneRowLinear, TiedHead
from minivlm.speed.pieces import GatedMLPInPieces, MLPInPieces, SwiGLUInPieces
from minivlm.speed.replacing import replace_modules

__all__ = ["speed_up"]


def speed_up(model: nn.Module) -> nn.Module:
    """Run MLPs in pieces and single rows at memory speed, and skip outputs that are never read.

    Use the returned model instead of the original. It can be trained and saved in the same way.
    """
    replace_modules(
        model,
        {
            MLP: MLPInPieces,
            GatedMLP: GatedMLPInPieces,
            SwiGLU: SwiGLUInPieces,
            nn.Linear: OneRowLinear,
        },
    )
    for module in list(model.modules()):
        table = getattr(module, "embed_tokens", None)
        if type(table) is nn.Embedding and getattr(module, "lm_head", table) is None:
            module.lm_head = TiedHead(table)
    return skip_unread(model)
