"""What a model with int8 or int4 weights should be equal to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Embedding, Int8Linear


@torch.no_grad()
def put_rounded_weights(rounded: Any, model: Any) -> None:
    """Give each matrix of the decoder of `model` the weights that the one of `rounded` stands for."""
    for name, layer in rounded.language_model.named_modules():
        if isinstance(layer, Int8Linear | Int4Linear) and name != "lm_head":
            model.language_model.get_submodule(name).weight.copy_(layer.plain())
        elif isinstance(layer, Int8Embedding):
            table = layer.weight.float() * layer.scale.float()[:, None]
            model.language_model.get_submodule(name).weight.copy_(table)
    head = getattr(model.language_model, "lm_head", None)
    if isinstance(head, nn.Linear):  # a matrix of its own, and not the table
        head.weight.copy_(rounded.language_model.lm_head.plain())
