"""Adapters on a model: new ones to train, others from folders. One is active, and switching copies nothing.

>>> model, processor = load("google/paligemma-3b-mix-224", adapter="runs/receipts")  # named "default"
>>> put_on(model, "runs/maps", name="maps")  # active from now on
>>> switch_to(model, "default")
>>> switch_to(model, None)  # the base alone
>>> take_off(model)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.adapters.config import LoraConfig
from minivlm.adapters.dora import DoraChange, plain_weight
from minivlm.adapters.fitting import places_of_new, places_of_stored
from minivlm.adapters.folders import AdapterFiles, norms_of, read_adapter, write_adapter
from minivlm.adapters.lora import AdaptedLinear, LowRank
from minivlm.adapters.names import Place, of_layer
from minivlm.errors import InputError


class Adapter(nn.Module):
    """The weights of one adapter: a change for each matrix, by its name in transformers."""

    def __init__(self, config: LoraConfig, changes: Mapping[str, LowRank], norms: str) -> None:
        super().__init__()
        self.config, self.norms = config, norms
        self.names = tuple(changes)
        self.changes = nn.ModuleList(changes.values())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """As `write_adapter` takes them."""
        return {
            name: dict(change.named_parameters())
            for name, change in zip(self.names, self.changes, strict=True)
        }

    def save(self, folder: str | Path) -> None:
        """Write a folder that `put_on` and peft open. Raises InputError: as `write_adapter`."""
        write_adapter(Path(folder), self.config, self.tensors(), self.norms)


def new_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> Adapter:
    """Put a new adapter on a model, which answers as before until the adapter is trained.

    Only the adapter's weights are to be trained: `model.requires_grad_(False)` before this call.

    Args:
        config: without `target_modules`, all linear layers of the decoder's blocks are changed.
        generator: for the random weights.

    Raises InputError: a target that matches no layer; the name is taken; packed weights, for DoRA.
    """
    _check_name(model, name)
    config, chosen = places_of_new(model, config)
    changes = {key: _change(model, key, place, config) for key, place in chosen.items()}
    for key, change in changes.items():
        change.reset(generator)
        _start(model, chosen[key], change)
    return _wear(model, name, config, changes, chosen)


def put_on(model: nn.Module, adapter: str | Path | AdapterFiles, name: str = "default") -> Adapter:
    """Put an adapter on a model, and make it the active one.

    Args:
        adapter: its folder, or a repo of the Hub.

    Raises InputError: as `read_adapter`; the adapter is for another base; the name is taken.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
    _check_name(model, name)
    chosen = places_of_stored(model, files)
    config = files.config
    changes = {key: _change(model, key, place, config) for key, place in chosen.items()}
    for key, change in changes.items():
        with torch.no_grad():
            for part, parameter in change.named_parameters():
                parameter.copy_(files.tensors[key][part])
    return _wear(model, name, config, changes, chosen).eval()


def switch_to(model: nn.Module, name: str | None) -> None:
    """Make another adapter the active one, or none.

    Raises InputError: there is no such adapter; one is merged into the weights.
    """
    for layer in _layers_for(model, name).values():
        layer.active = name if name is not None and name in layer.changes else None


def take_off(model: nn.Module, name: str | None = None) -> None:
    """Remove an adapter, or all of them. Another one that is active stays so.

    Raises InputError: as `switch_to`.
    """
    for path, layer in _layers_for(model, name).items():
        for one in list(layer.changes):
            if name in (one, None):
                del layer.changes[one]
        if layer.active not in list(layer.changes):
            layer.active = None
        if not layer.changes:
            replace_layer(model, path, layer.base)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that wear something, by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put another layer in the place of one."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _layers_for(model: nn.Module, name: str | None) -> dict[str, AdaptedLinear]:
    """All adapted layers. Raises InputError: no adapter of this name, or one is merged into the weights."""
    layers = adapted_layers(model)
    known = sorted({one for layer in layers.values() for one in layer.changes})
    if name is not None and name not in known:
        raise InputError(f"the model has no adapter {name!r}: choose from {', '.join(known) or 'none'}")
    if any(layer.original is not None for layer in layers.values()):
        raise InputError("an adapter is merged into the weights: unmerge it first")
    return layers


def _change(model: nn.Module, key: str, place: Place, config: LoraConfig) -> LowRank:
    """An uninitialized change of one matrix, where the matrix is."""
    kind = DoraChange if config.use_dora else LowRank
    out, into = place.shape
    layer: Any = model.get_submodule(place.layers[0])
    return kind(
        into,
        out,
        of_layer(key, config.rank_pattern, config.r),
        of_layer(key, config.alpha_pattern, config.lora_alpha),
        config.lora_dropout,
        config.use_rslora,
    ).to(layer.weight.device)


def _start(model: nn.Module, place: Place, change: LowRank) -> None:
    for layer, rows in _layers(model, place):
        base = layer.base if isinstance(layer, AdaptedLinear) else layer
        if isinstance(change, DoraChange):
            change.start_at(plain_weight(base), rows)


def _wear(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    changes: Mapping[str, LowRank],
    chosen: Mapping[str, Place],
) -> Adapter:
    norms = norms_of(model)
    for key, change in changes.items():
        for (layer, rows), path in zip(_layers(model, chosen[key]), chosen[key].layers, strict=True):
            if not isinstance(layer, AdaptedLinear):
                layer = AdaptedLinear(layer, rows).train(layer.training)
                replace_layer(model, path, layer)
            layer.changes[name] = change
    switch_to(model, name)
    return Adapter(config, changes, norms)


def _layers(model: nn.Module, place: Place) -> Iterator[tuple[Any, Any]]:
    for path, rows in zip(place.layers, place.rows, strict=True):
        yield model.get_submodule(path), rows


def _check_name(model: nn.Module, name: str) -> None:
    """Raises InputError: it cannot be the name of an adapter, or already is."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise InputError(f"{name!r} cannot be the name of an adapter: choose letters, digits, - and _")
    layers = adapted_layers(model).values()
    if any(name in layer.changes for layer in layers):
        raise InputError(
            f"the model already has an adapter {name!r}: choose another name, or take it off first"
        )
    if any(layer.original is not None for layer in layers):
        raise InputError("an adapter is merged into the weights: unmerge it first")
