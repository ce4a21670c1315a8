"""How peft names what it changes: by the modules of transformers, which the layouts of checkpoints know.

Some of these hold in one matrix what is several layers here, such as queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minivlm.adapters.config import LoraConfig
from minivlm.adapters.lora import AdaptedLinear, Rows
from minivlm.checkpoints.layouts import (
    CLIP_LAYOUTS,
    DEEPSEEK_VL2_LAYOUTS,
    DEEPSEEK_VL_HYBRID_LAYOUTS,
    DEEPSEEK_VL_LAYOUTS,
    LLAMA_VISION_LAYOUTS,
    LLAVA_LAYOUTS,
    PALIGEMMA_LAYOUTS,
    QWEN2_VL_LAYOUTS,
    SIGLIP_LAYOUTS,
    VIT_LAYOUTS,
    Layout,
    names_in,
    qwen_vl_layouts,
    split,
    to_file,
    to_ours,
)
from minivlm.errors import InputError
from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Linear
from minivlm.speed.packing import PackedLinear

LINEAR = (nn.Linear, Int8Linear, Int4Linear, PackedLinear, AdaptedLinear)
OWN_NAMES: Layout = [("", "")]  # of a system that is in no other program

# model_type -> the layout with the names of modules, then those that older files may use.
LAYOUTS: dict[str, list[Layout]] = {
    "paligemma": [PALIGEMMA_LAYOUTS["runtime"], *PALIGEMMA_LAYOUTS.values()],
    "llava": [LLAVA_LAYOUTS["runtime"], *LLAVA_LAYOUTS.values()],
    "qwen2_vl": [QWEN2_VL_LAYOUTS["runtime"], *QWEN2_VL_LAYOUTS.values()],
    "qwen2_5_vl": [QWEN2_VL_LAYOUTS["runtime"], *QWEN2_VL_LAYOUTS.values()],
    "mllama": [LLAMA_VISION_LAYOUTS["runtime"], *LLAMA_VISION_LAYOUTS.values()],
    "deepseek_vl": list(DEEPSEEK_VL_LAYOUTS.values()),
    "deepseek_vl_hybrid": list(DEEPSEEK_VL_HYBRID_LAYOUTS.values()),
    "deepseek_vl_v2": list(DEEPSEEK_VL2_LAYOUTS.values()),
    "clip": [CLIP_LAYOUTS["hub"]],
    "siglip": [SIGLIP_LAYOUTS["hub"]],
}


def layouts_of(model: nn.Module) -> list[Layout]:
    """The names that the modules of a model have elsewhere, those of transformers' run-time modules first."""
    config: Any = model.config
    kind = config.to_dict().get("model_type") if hasattr(config, "to_dict") else None
    if kind == "qwen":
        return list(qwen_vl_layouts(config.vision.num_attention_heads).values())
    if kind == "vit":
        end = "" if config.labels else " without classifier"
        return [VIT_LAYOUTS[f"runtime{end}"], *VIT_LAYOUTS.values()]
    return LAYOUTS.get(str(kind), [OWN_NAMES])


@dataclass(frozen=True)
class Place:
    """A matrix as transformers has it, and the layers here that hold its rows."""

    layers: tuple[str, ...]
    rows: tuple[Rows, ...]  # of each layer
    shape: tuple[int, int]  # of the matrix: out, in


def places(model: nn.Module, layout: Layout) -> dict[str, Place]:
    """Every matrix of a model that can be adapted, by the name of its module in a layout."""
    layers = dict(linear_layers(model))
    found: dict[str, Place] = {}
    for layer in layers:
        try:
            file = to_file(f"{layer}.weight", layout)
        except KeyError:  # a part that files of this layout lack
            continue
        name = file.removesuffix(".weight")
        ours = to_ours(file, layout)
        if name == file or name in found or ours is None or ours.endswith("^T"):
            continue
        parts = tuple(part.removesuffix(".weight") for part in names_in(ours))
        if all(part in layers for part in parts):
            found[name] = _place(parts, ours, [layers[part] for part in parts])
    return found


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules, those inside of `AdaptedLinear` left out."""
    for name, module in model.named_modules():
        if isinstance(module, LINEAR) and not name.endswith(".base"):
            yield name, module


def _place(parts: tuple[str, ...], ours: str, layers: list[Any]) -> Place:
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    out = sum(shape[0] for shape in shapes)
    numbers = split(torch.arange(out)[:, None], ours)
    return Place(parts, tuple(_slice(one[:, 0]) for one in numbers), (out, shapes[0][1]))


def _slice(numbers: torch.Tensor) -> Rows:
    start, count = int(numbers[0]), len(numbers)
    in_a_row = torch.equal(numbers, torch.arange(start, start + count))
    return slice(start, start + count) if in_a_row else numbers


# ---- which of them a config means, by the rules of peft ----------------------------------------------------


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether an adapter changes the module of this name."""
    if config.exclude_modules is not None and _matches(config.exclude_modules, name):
        return False
    if config.target_modules is None or not _matches(config.target_modules, name):
        return False
    return isinstance(config.target_modules, str) or _in_layers(config, name)


def _matches(wanted: tuple[str, ...] | str, name: str) -> bool:
    """A list is of names, or of how they end; a str is a regular expression for the whole name."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error as error:
            raise InputError(f"{wanted!r} is no regular expression for names of layers ({error})") from error
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _in_layers(config: LoraConfig, name: str) -> bool:
    numbers, patterns = config.layers_to_transform, config.layers_pattern or ()
    if numbers is None or numbers == ():
        return True
    wanted = [rf"(?:^|.*?\.){p}" for p in ((patterns,) if isinstance(patterns, str) else patterns)]
    for pattern in wanted or [r".*?\.[^.]*"]:
        match = re.match(rf"{pattern}\.(\d+)\.", name)
        if match is not None:
            return int(match[1]) in ((numbers,) if isinstance(numbers, int) else numbers)
    return False


def of_layer(name: str, pattern: Mapping[str, Any], otherwise: Any) -> Any:
    """The value of the first key that is a name's end, as peft reads `rank_pattern` and `alpha_pattern`."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def ends(names: Iterable[str]) -> list[str]:
    """What can be targeted: the last parts of names."""
    return sorted({name.rpartition(".")[2] for name in names})
