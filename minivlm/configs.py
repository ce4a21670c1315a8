"""How a config.json is read: the fields that a model uses, and the values that it refuses.

Each config is a frozen dataclass in the file of the part that it describes, one dataclass per part, nested:
`PaliGemmaConfig(vision=..., text=...)`. Field names are those of config.json, so `num_key_value_heads` means
the same here as in transformers. A published config.json has many more fields than a forward pass needs. They
are ignored, unless a value would change what the model computes: then it is refused rather than computed
wrongly. A field that the file lacks gets the default of transformers, because older files omit values that
equal it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from minivlm.errors import InputError
from minivlm.layers import ACTIVATIONS


def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of a dataclass, without nulls, which mean that the file does not say."""
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def known_numbers(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the named values that the file has."""
    return {name: values[name] for name in names if values.get(name) is not None}


def known_alone(
    part: str, values: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a part of open_clip's config with nothing else in it, and defaults for what it lacks.

    There, an option that is not named is off, so a name that is not known here changes what is computed.

    Args:
        fixed: names that may be there with one value.

    Raises InputError: another name, unless it is off (null, false, 0); a number that is none.
    """
    found = dict(defaults)
    for name, value in values.items():
        if value and name not in defaults and (name not in fixed or value != fixed[name]):
            raise InputError(f"{part} has {name} = {value!r}, which is not supported here")
        if name in defaults and value is not None:
            if isinstance(defaults[name], int | float) and not _is(value, type(defaults[name])):
                raise InputError(f"{part} has {name} = {value!r}, expected a number: download the file again")
            found[name] = value
    return found


def open_clip_parts(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The `model_cfg` of open_clip: embed_dim, vision_cfg and text_cfg, and the activation of all blocks.

    Raises InputError: a part is missing, or there are others, for other systems than CLIP.
    """
    parts = {"embed_dim": 0, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}
    found = known_alone("model_cfg", values, parts, {})
    for name in ("vision_cfg", "text_cfg"):
        part_of(found, name)
    return found, "quick_gelu" if found["quick_gelu"] else "gelu"


def known_decoder(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Gemma decoder. Raises InputError: another activation, scaled rotary positions."""
    if values.get("hidden_activation") is not None:
        expect(values, "text_config", "hidden_activation", "gelu_pytorch_tanh")
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"  # the old name wins
    rope = part_of(values, name)
    for key in ("type", "rope_type"):  # the old key and the new one
        expect(rope, f"text_config.{name}", key, "default")
    for key in ("sliding_attention", "full_attention"):
        if key in rope:
            raise InputError(f"text_config.{name} has its own {key}; only one for all layers is supported")
    found = known(cls, values)
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    return found


def expect(values: Mapping[str, Any], part: str, name: str, supported: Any) -> None:
    """Raise InputError if a value asks for something that this package does not compute."""
    value = values.get(name, supported)
    if value != supported:
        raise InputError(f"{part} has {name} = {value!r}; only {supported!r} is supported here")


def require_system(values: Mapping[str, Any], model_type: str) -> None:
    """Raise InputError if config.json describes another system."""
    if values.get("model_type") != model_type:
        raise InputError(
            f"config.json says model_type {values.get('model_type')!r}, but this class is for "
            f"{model_type!r}: use a folder of that system"
        )


def part_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a config.json, empty if it is missing. Raises InputError: it is not an object.

    In old files, `text_config_dict` or `vision_config_dict` overrides the part without `_dict`.
    """
    old = values.get(f"{name}_dict")
    part = values.get(name) if old is None else old
    if part is not None and not isinstance(part, Mapping):
        raise InputError(f"{name} in config.json is {part!r}, expected an object: download the file again")
    return part or {}


# Far beyond any published model: what is built from larger numbers would fill the memory before the weights
# could disagree with them. By default 2^24.
LARGEST = {"num_hidden_layers": 2**10, "image_size": 2**14}
LEAST = {
    "vision_feature_layer": -(2**10),  # counted from the end
    **dict.fromkeys(("max_num_media", "max_num_frames", "first_k_dense_replace"), 0),  # none
}


def check_types(config: Any) -> None:
    """Raise InputError unless every value of a config has the type that its field declares.

    Sizes and counts are at least 1, ids at least 0; exceptions are in `LEAST` and `LARGEST`.
    """
    kinds = get_type_hints(type(config))
    for field in fields(config):
        name, kind, value = field.name, kinds[field.name], getattr(config, field.name)
        if not _is(value, kind):
            raise InputError(f"{name} is {value!r}, expected {field.type}: check the model's config.json")
        least, most = LEAST.get(name, 0 if name.endswith("_id") else 1), LARGEST.get(name, 2**24)
        counts = int in (kind, *get_args(kind)) and isinstance(value, int)
        if counts and not least <= value <= most:
            raise InputError(f"{name} is {value}, expected {least} to {most}: check the model's config.json")


def _is(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type: a class, a union, or tuple[..., ...]."""
    if get_origin(kind) is UnionType:
        return any(_is(value, choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind in (int, float) and isinstance(value, bool):  # which Python takes for a number
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def check_width(hidden_size: int, num_attention_heads: int) -> None:
    """Raise InputError if the width of an encoder is not divisible by its number of heads."""
    if hidden_size % num_attention_heads:
        raise InputError(
            f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads: "
            "choose a multiple of num_attention_heads"
        )


def check_activation(hidden_act: str) -> None:
    """Raise InputError if `minivlm.layers.MLP` does not have this activation."""
    if hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act is {hidden_act!r}: only {', '.join(ACTIVATIONS)} are supported here")


def check_grid(image_size: int, patch_size: int) -> None:
    """Raise InputError if no patch fits in the picture."""
    if not 0 < patch_size <= image_size:
        raise InputError(
            f"patch_size {patch_size} does not fit in image_size {image_size}: "
            "choose a patch between 1 pixel and the whole image"
        )


def check_heads(num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> None:
    """Raise InputError if query heads cannot share keys evenly, or if head_dim is odd."""
    if num_attention_heads % num_key_value_heads:
        raise InputError(
            f"{num_attention_heads} query heads cannot share {num_key_value_heads} key/value "
            "heads evenly: num_attention_heads must be a multiple of num_key_value_heads"
        )
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd, but rotary positions rotate pairs: choose an even one")
