"""How a config.json is read: the fields that a model knows, and the values that it refuses.

Each config is a frozen dataclass and stands on top of the part that it shapes, one dataclass per part,
nested: `PaliGemmaConfig(vision=..., text=...)`. Field names are those of config.json, so that a reader who
meets `num_key_value_heads` here finds it again in transformers. A published config.json holds many more
fields than a forward pass needs. They are ignored, except where a value would change what the model
computes: then it is refused rather than computed wrongly. A field that the file lacks has the default of
transformers, because transformers leaves out what equals its default in older files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minivlm.errors import InputError
from minivlm.layers import ACTIVATIONS


def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of a dataclass; null means that the file does not say."""
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def known_numbers(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """These values, as far as the file has them."""
    return {name: values[name] for name in names if values.get(name) is not None}


def known_decoder(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma and Gemma 2 read alike. Raises InputError: another activation, scaled rotary positions."""
    # Older files say hidden_act "gelu_fast" or "gelu": what was always computed is hidden_activation,
    # and where that is missing, the tanh form.
    if values.get("hidden_activation") is not None:
        expect(values, "text_config", "hidden_activation", "gelu_pytorch_tanh")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    expect(rope, "text_config.rope_parameters", "rope_type", "default")
    found = known(cls, values)
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    return found


def expect(values: Mapping[str, Any], part: str, name: str, supported: Any) -> None:
    """Raises InputError: a value that would make the model compute something else than this package does."""
    value = values.get(name, supported)
    if value != supported:
        raise InputError(f"{part} has {name} = {value!r}; only {supported!r} is supported here")


def require_system(values: Mapping[str, Any], model_type: str) -> None:
    """Raises InputError: a config.json of another system."""
    if values.get("model_type") != model_type:
        raise InputError(
            f"config.json says model_type {values.get('model_type')!r}, and this class computes "
            f"{model_type!r}: use a folder of that system"
        )


def part_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a config.json, empty where it is missing. Raises InputError: it is no object.

    In old files a `text_config_dict` or `vision_config_dict` takes the place of the part without `_dict`.
    """
    old = values.get(f"{name}_dict")
    part = values.get(name) if old is None else old
    if part is not None and not isinstance(part, Mapping):
        raise InputError(f"{name} in config.json is {part!r}, expected an object: get the file again")
    return part or {}


def check_width(hidden_size: int, num_attention_heads: int) -> None:
    """Raises InputError: the width of an encoder does not divide into its heads."""
    if hidden_size % num_attention_heads:
        raise InputError(
            f"hidden_size {hidden_size} does not divide into {num_attention_heads} heads: "
            "choose a multiple of num_attention_heads"
        )


def check_activation(hidden_act: str) -> None:
    """Raises InputError: an activation that `minivlm.layers.MLP` does not have."""
    if hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act is {hidden_act!r}: only {', '.join(ACTIVATIONS)} are supported here")


def check_grid(image_size: int, patch_size: int) -> None:
    """Raises InputError: no patch fits into the picture."""
    if not 0 < patch_size <= image_size:
        raise InputError(
            f"patch_size {patch_size} does not fit into image_size {image_size}: "
            "choose a patch between 1 pixel and the whole image"
        )


def check_heads(num_attention_heads: int, num_key_value_heads: int, head_dim: int) -> None:
    """Raises InputError: queries that cannot share keys evenly, or heads without pairs of numbers."""
    if num_attention_heads % num_key_value_heads:
        raise InputError(
            f"{num_attention_heads} query heads cannot share {num_key_value_heads} key/value "
            "heads evenly: num_attention_heads must be a multiple of num_key_value_heads"
        )
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd, but rotary positions turn pairs of numbers")
