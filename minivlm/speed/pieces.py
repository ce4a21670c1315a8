"""MLPs that process their tokens in pieces, and gate them in place.

An MLP processes each token on its own and expands it to a vector several times as wide, eight times in Gemma.
Expanding all tokens of a long row at once would waste memory. In pieces, the intermediate results stay in the
processor's cache. With AMX, products of many rows are so fast that reading the weights once more for each
piece takes longer than it saves, so there pieces are long.

A result that nobody reads again is overwritten by the next one, since new memory has to be fetched from the
system, page by page. The backward pass needs all of them, so nothing of this is done when gradients are
needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import has_amx
from minivlm.layers import MLP, GatedMLP, SwiGLU

TOKENS_PER_PIECE = 256
WITH_AMX = 2048  # in bf16
GELUS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # by the name of an activation


def tokens_per_piece(dtype: torch.dtype) -> int:
    """Approximately, on this processor."""
    return WITH_AMX if dtype == torch.bfloat16 and has_amx() else TOKENS_PER_PIECE


def in_pieces(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x), in pieces where that helps: on a CPU, when no gradients are needed.

    Args:
        layer: processes each token on its own.
        x: [..., D]; the result has the same shape.
    """
    tokens = x.flatten(0, -2)  # [B * T, D]
    pieces = round(len(tokens) / tokens_per_piece(x.dtype))
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
    """The MLP of an encoder, in pieces and in place."""

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        if torch.is_grad_enabled() or self.hidden_act not in GELUS:
            return super().at_once(x)
        out: Tensor = self.fc2(torch.ops.aten.gelu_(self.fc1(x), approximate=GELUS[self.hidden_act]))
        return out


class GatedMLPInPieces(InPieces, GatedMLP):
    """The MLP of Gemma, in pieces and in place."""

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        if torch.is_grad_enabled():
            return super().at_once(x)
        gate = torch.ops.aten.gelu_(self.gate_proj(x), approximate="tanh")
        out: Tensor = self.down_proj(gate.mul_(self.up_proj(x)))
        return out


class SwiGLUInPieces(InPieces, SwiGLU):
    """The MLP of Llama, in pieces and in place."""

    def at_once(self, x: Tensor) -> Tensor:
        """The MLP itself: x [..., D] -> [..., D]."""
        if torch.is_grad_enabled():
            return super().at_once(x)
        gate = F.silu(self.gate_proj(x), inplace=True)
        out: Tensor = self.down_proj(gate.mul_(self.up_proj(x)))
        return out
