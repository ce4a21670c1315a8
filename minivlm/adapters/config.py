"""adapter_config.json of peft: which matrices an adapter changes, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minivlm.errors import InputError

CONFIG = "adapter_config.json"

# Fields that say nothing of what is computed from the weights in the file.
UNREAD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core",
    "init_lora_weights", "qalora_group_size", "ephemeral_gpu_offload", "runtime_config", "loftq_config",
    "ensure_weight_tying", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
# Ways to begin that leave the base as it is. Others (PiSSA, OLoRA, LoftQ, ...) move a part of W into B A.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
Names = tuple[str, ...] | str


@dataclass(frozen=True)
class LoraConfig:
    """What decides an adapter beside its weights. Field names and defaults are peft's."""

    target_modules: Names | None = None  # how names of layers end; a str: what a whole name has to match
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # for some layers another r
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError: a number that no adapter can have."""
        for rank in (self.r, *self.rank_pattern.values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 2**16:
                raise InputError(f"the rank of an adapter is {rank!r}: choose a whole number from 1")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise InputError(f"lora_alpha is {alpha!r}: choose a number above 0")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout!r}: choose a share from 0 to below 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """From a whole adapter_config.json. Raises InputError: it asks for what is not computed here."""
        kind = values.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{CONFIG} has peft_type {kind!r}: only 'LORA' is supported here")
        known = {one.name for one in fields(cls)}
        supported = known | UNREAD | {"bias"}
        others = [name for name, value in values.items() if value and name not in supported]
        if others:
            named = ", ".join(f"{name} = {values[name]!r}" for name in others)
            raise InputError(
                f"{CONFIG} has {named}, which is not supported here: merge the adapter with peft, and load "
                "the merged model"
            )
        if values.get("bias", "none") != "none":
            raise InputError(
                f"{CONFIG} has bias = {values['bias']!r}: biases that are trained are not supported"
            )
        start = values.get("init_lora_weights", True)
        if start not in STARTS:
            raise InputError(
                f"{CONFIG} has init_lora_weights = {start!r}, which also changes the weights of the base: "
                "save the adapter as a plain one, with peft's `path_initial_model_for_weight_conversion`"
            )
        given = {name: _tuple(values[name]) for name in known if values.get(name) is not None}
        if "target_modules" not in given:
            raise InputError(f"{CONFIG} names no target_modules: is it whole?")
        _check_types(given)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """An adapter_config.json that peft opens."""
        values = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }
        return {"peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none", **values}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_types(values: Mapping[str, Any]) -> None:
    """Raises InputError: a value is of a type that peft does not write."""
    for name, value in values.items():
        if name.endswith("_modules") or name == "layers_pattern":
            good = isinstance(value, str) or (
                isinstance(value, tuple) and all(isinstance(i, str) for i in value)
            )
        elif name == "layers_to_transform":
            good = isinstance(value, int) or (
                isinstance(value, tuple) and all(isinstance(i, int) for i in value)
            )
        elif name.endswith("_pattern"):
            good = isinstance(value, Mapping)
        elif name.startswith("use_"):
            good = isinstance(value, bool)
        else:  # numbers are checked by the config itself
            good = name != "base_model_name_or_path" or isinstance(value, str)
        if not good:
            raise InputError(f"{CONFIG} has {name} = {value!r}, which peft does not write: is it whole?")
