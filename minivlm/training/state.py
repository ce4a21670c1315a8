"""The state of a training run in one file that is always whole.

Weights, optimizer state and step go into one safetensors file, which is written aside and then renamed.
Whenever the process is killed, the file on disk is either the old state or the new one. No pickle is
involved, so a state file from somebody else is safe to open.

There is no random state to keep: batch number n is a function of (seed, n), and nothing else is random. The
device is not kept either, since a run may continue on another one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.files import write_aside


def save_state(
    path: Path,
    step: int,
    modules: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    config: Mapping[str, Any],
    unlogged: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write everything that the next step depends on, and the losses that the next line of the log needs.

    Raises InputError: the disk is full; the old file is untouched.
    """
    tensors = {f"weights.{name}": tensor for name, tensor in modules.state_dict().items()}
    for kind, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                tensors[f"{kind}.{index}.{slot}"] = torch.as_tensor(value)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "config": json.dumps(dict(config)), "unlogged": json.dumps(unlogged)}
    metadata["checksum"] = checksum(tensors, metadata)
    with write_aside(path) as temporary:
        save_file(tensors, temporary, metadata)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of all that is in the file. safetensors has none, and a damaged state would go on unnoticed."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, total)
    others = sorted(item for item in metadata.items() if item[0] != "checksum")
    return f"{zlib.crc32(json.dumps(others).encode(), total):08x}"


def load_state(
    path: Path,
    modules: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    config: Mapping[str, Any],
    grows: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[int, list[dict[str, float]]]:
    """Put the state back and return the step and the unlogged losses.

    Args:
        grows: names of settings that may be larger than in the file, and what None stands for in each.

    Raises InputError: the file is damaged, or belongs to a run with another config.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata.get("checksum") != checksum(tensors, metadata):
            raise OSError("it was damaged or changed, or is not of this version")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): start a new run in another folder") from error
    step = int(metadata["step"])
    check_config(path.parent, json.loads(metadata["config"]), config, grows)
    try:
        modules.load_state_dict(_part(tensors, "weights."))
    except RuntimeError as error:  # the settings name a folder, and its weights may have been replaced
        raise InputError(
            f"{path} holds weights of other shapes than this model: start from the model of that run, or "
            "start a new run in another folder"
        ) from error
    for kind, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, f"{kind}.").items():
            index, slot = name.split(".")
            state.setdefault(int(index), {})[slot] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step, json.loads(metadata["unlogged"])


def check_config(
    out: Path, saved: Mapping[str, Any], config: Mapping[str, Any], grows: Mapping[str, Any]
) -> None:
    """Raises InputError: the run in `out` was saved with other settings, and they are none that may grow."""
    wanted = json.loads(json.dumps(dict(config)))  # as it comes back from the file: tuples are lists
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    differing = [name for name in differing if not _grew(name, saved.get(name), wanted.get(name), grows)]
    if differing:
        changes = ", ".join(f"{name} {saved.get(name)} -> {wanted.get(name)}" for name in differing)
        raise InputError(
            f"{out} holds a run with other settings ({changes}): use the old ones, or another folder"
        )


def _grew(name: str, before: Any, after: Any, grows: Mapping[str, Any]) -> bool:
    """Whether a setting is one that may grow, and has."""
    before, after = (grows.get(name) if value is None else value for value in (before, after))
    return name in grows and None not in (before, after) and after > before


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
