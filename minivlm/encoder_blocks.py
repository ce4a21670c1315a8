"""The encoder block with another activation: what CLIP and the original ViT change in `layers.EncoderBlock`.

A block is the same in ViT, CLIP and SigLIP but for the function between the two linear layers of its MLP.
Which one it is stands in config.json as `hidden_act`. The three are close to each other, and a model with
the wrong one still gives sensible answers, only worse ones: the name in the file has to be obeyed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.layers import MLP, EncoderBlock


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the cheaper GELU of CLIP; up to 0.02 away from the exact one."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,  # CLIP as OpenAI trained it
    "gelu": F.gelu,  # the exact one, by the error function: ViT, and CLIP as retrained by others
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),  # SigLIP, and what `layers.MLP` has
}


class ActivatedMLP(MLP):
    """`layers.MLP` with an activation chosen by name."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.hidden_act = hidden_act

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class ActivatedBlock(EncoderBlock):
    """`layers.EncoderBlock` with an activation chosen by name; norms, attention and sums are the same."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_attention_heads: int, eps: float, hidden_act: str
    ) -> None:
        super().__init__(hidden_size, intermediate_size, num_attention_heads, eps)
        self.mlp = ActivatedMLP(hidden_size, intermediate_size, hidden_act)
