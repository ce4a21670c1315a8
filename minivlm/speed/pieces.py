"""MLPs that take some tokens at a time.

An MLP treats each token alone, and makes a vector of it that is several times as wide, eight times in Gemma.
All tokens of a long row at once would fill memory for nothing. Piece by piece, what is made on the way stays
in the processor's cache. The backward pass needs all of it anyway, so with gradients nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlm.layers import MLP, GatedMLP

PIECE = 256  # tokens at a time, about


def in_pieces(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), some tokens at a time where that helps: on a CPU, and when no gradient is needed.

    Args:
        layer: what treats each token alone.
        x: [..., D] -> [..., D].
    """
    tokens = x.flatten(0, -2)  # [B * T, D]
    pieces = round(len(tokens) / PIECE)
    if pieces < 2 or x.device.type != "cpu" or torch.is_grad_enabled():
        return layer(x)
    return torch.cat([layer(piece) for piece in tokens.tensor_split(pieces)]).view_as(x)


class MLPInPieces(MLP):
    """The MLP of an encoder, some tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return in_pieces(self.at_once, x)

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        return super().forward(x)


class GatedMLPInPieces(GatedMLP):
    """The MLP of a decoder, some tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return in_pieces(self.at_once, x)

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        return super().forward(x)
