"""Which matrices of a model an adapter changes: one that is new, or one from a folder, which has to fit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from minivlm.adapters.config import LoraConfig
from minivlm.adapters.folders import AdapterFiles, norms_of
from minivlm.adapters.names import Place, ends, is_target, layouts_of, of_layer, places
from minivlm.checkpoints.hub import few
from minivlm.errors import InputError


def places_of_new(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, Place]]:
    """Where a new adapter goes, by names in transformers, and its config with targets.

    Without `target_modules`, these are all linear layers of the blocks: of the decoder, if there is one.

    Raises InputError: a target matches no linear layer.
    """
    found = places(model, layouts_of(model)[0])
    if config.target_modules is None:
        blocks = [key for key, place in found.items() if place.layers[0].startswith("language_model.layers.")]
        blocks = blocks or [key for key, place in found.items() if ".layers." in place.layers[0]]
        config = replace(config, target_modules=tuple(blocks))
    wanted = config.target_modules or ()
    for one in (wanted,) if isinstance(wanted, str) else tuple((end,) for end in wanted):
        if not any(is_target(replace(config, target_modules=one), key) for key in found):
            asked = one if isinstance(one, str) else one[0]
            raise InputError(
                f"no linear layer of this {type(model).__name__} is named {asked}: choose from "
                f"{', '.join(ends(found))}"
            )
    chosen = {key: place for key, place in found.items() if is_target(config, key)}
    if not chosen:
        raise InputError(f"this {type(model).__name__} has no linear layer to adapt: choose another model")
    return config, chosen


def places_of_stored(model: nn.Module, files: AdapterFiles) -> dict[str, Place]:
    """Where the tensors of a folder belong, by the names that it uses.

    Raises InputError: they fit another model, or were trained on one of the same shape.
    """
    # Of the names that versions of transformers had, those that the folder uses; of several, the newest.
    known = max(
        (places(model, layout) for layout in layouts_of(model)),
        key=lambda found: len(found.keys() & files.tensors.keys()),
    )
    chosen = {key: known[key] for key in files.tensors if key in known}
    meant = {place.layers for key, place in known.items() if is_target(files.config, key)}
    given = {place.layers for place in chosen.values()}
    parts = {"lora_A", "lora_B"} | ({"magnitude"} if files.config.use_dora else set())
    kinds = {
        "not in the model": [key for key in files.tensors if key not in known],
        "among the targets, but without weights": [
            key for key, place in known.items() if place.layers in meant - given
        ],
        "not among the targets": [key for key, place in chosen.items() if place.layers not in meant],
        "with other tensors than the config says": [k for k in chosen if files.tensors[k].keys() != parts],
        "of another shape": [key for key, place in chosen.items() if not _fits(files, key, place)],
    }
    problems = [f"{kind}: {few(names)}" for kind, names in kinds.items() if names]
    if problems or not chosen:
        told = "; ".join(problems) or "it is empty"
        raise InputError(
            f"{files.told} does not fit this {type(model).__name__} ({told}): load the base that it was made "
            "for, or choose another adapter"
        )
    # In fp16, the weights of norms may have been rounded twice.
    comparable = all(weight.dtype != torch.float16 for weight in model.parameters())
    if files.norms is not None and comparable and files.norms != norms_of(model):
        raise InputError(
            f"{files.told} was trained on other weights than those of this {type(model).__name__}: load the "
            "base that it was made for, or choose another adapter"
        )
    return chosen


def _fits(files: AdapterFiles, key: str, place: Place) -> bool:
    (out, into), rank = place.shape, of_layer(key, files.config.rank_pattern, files.config.r)
    shapes = {"lora_A": (rank, into), "lora_B": (out, rank), "magnitude": (out,)}
    return all(tuple(tensor.shape) == shapes[part] for part, tensor in files.tensors[key].items())
