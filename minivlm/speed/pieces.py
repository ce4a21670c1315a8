"""MLPs that process their tokens in pieces.

An MLP processes each token on its own and expands it to a vector several times as wide, eight times in Gemma.
Expanding all tokens of a long row at once would waste memory. In pieces, the intermediate results stay in the
processor's cache. The backward pass needs all of them anyway, so nothing is split when gradients are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlm.layers import MLP, GatedMLP, SwiGLU

TOKENS_PER_PIECE = 256  # approximately


def in_pieces(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), in pieces where that helps: on a CPU, when no gradients are needed.

    Args:
        layer: processes each token on its own.
        x: [..., D]; the result has the same shape.
    """
    tokens = x.flatten(0, -2)  # [B * T, D]
    pieces = round(len(tokens) / TOKENS_PER_PIECE)
    if pieces < 2 or x.device.type != "cpu" or torch.is_grad_enabled():
        return layer(x)
    return torch.cat([layer(piece) for piece in tokens.tensor_split(pieces)]).view_as(x)


class InPieces(nn.Module):
    """Comes before an MLP among the bases of a class, and runs that MLP in pieces."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return in_pieces(self.at_once, x)

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        out: Tensor = super().forward(x)
        return out


class MLPInPieces(InPieces, MLP):
    """The MLP of an encoder, in pieces."""


class GatedMLPInPieces(InPieces, GatedMLP):
    """The MLP of Gemma, in pieces."""


class SwiGLUInPieces(InPieces, SwiGLU):
    """The MLP of Llama, in pieces."""
