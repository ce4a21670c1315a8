"""Merging: an adapter becomes a part of the weights, and the model as fast as its base.

The old weights wait beside the new ones, so unmerging is exact in any dtype, where subtracting would leave
the error of rounding. If they are pages of the memory-mapped file, waiting costs no memory.
"""

from __future__ import annotations

import torch
from torch import nn

from minivlm.adapters.dora import plain_weight
from minivlm.adapters.lora import AdaptedLinear
from minivlm.adapters.put_on import adapted_layers, replace_layer, switch_to
from minivlm.errors import InputError


def merge(model: nn.Module, name: str = "default") -> None:
    """Merge an adapter into the weights, until `unmerge`. Inference only.

    Raises InputError: there is no such adapter; one is merged already; the weights are quantized or packed.
    """
    switch_to(model, name)
    layers = [layer for layer in adapted_layers(model).values() if layer.active == name]
    _check(layers)
    for layer in layers:
        layer.original = layer.base.weight
        layer.base.weight = _merged(layer)


def unmerge(model: nn.Module) -> None:
    """Give the layers their old weights, bit for bit. The adapter is active as before."""
    for layer in adapted_layers(model).values():
        if layer.original is not None:
            layer.base.weight, layer.original = layer.original, None


def merge_for_good(model: nn.Module, name: str = "default") -> None:
    """Merge an adapter and forget it, one matrix at a time: what is left is a model without adapters.

    Other adapters are taken off. Raises InputError: as `merge`.
    """
    switch_to(model, name)
    layers = adapted_layers(model)
    _check([layer for layer in layers.values() if layer.active == name])
    for path, layer in layers.items():
        if layer.active == name:
            layer.base.weight = _merged(layer)
        replace_layer(model, path, layer.base)


def _check(layers: list[AdaptedLinear]) -> None:
    """Raises InputError: a layer has no weight that can be replaced."""
    if not all(isinstance(layer.base, nn.Linear) for layer in layers):
        raise InputError(
            "the weights are quantized or packed, and nothing can be merged into them: load the model "
            "without quantizing or packing (from the folder that a converted one was made from), merge, "
            "save, and quantize or pack when loading"
        )


@torch.no_grad()
def _merged(layer: AdaptedLinear) -> nn.Parameter:
    """Computed in fp32, and rounded once to the dtype of the weight."""
    change = layer.changes[layer.active]  # type: ignore[index]
    weight = change.merged(plain_weight(layer.base), layer.rows)  # type: ignore[operator]
    return nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
