"""Sharded training: weights, gradients and moments of AdamW are divided among processes, each holds its part.

PyTorch's FSDP2 (`fully_shard`; Y. Zhao et al., 2023, https://arxiv.org/abs/2304.11277, after ZeRO, S.
Rajbhandari et al., 2019, https://arxiv.org/abs/1910.02054) does the work. Before a block computes, its
weights are gathered from all processes, and afterwards they are let go:

                       process 0           process 1
    at rest            | a0 |  | b0 |      | a1 |  | b1 |        half of block a, half of block b
    block a computes   | a0 a1 | b0 |      | a0 a1 | b1 |        all-gather
    block b computes   | a0 | b0 b1 |      | a1 | b0 b1 |
    backward of b      | grad b0 |         | grad b1 |           reduce-scatter: each adds up its own half

So no process ever holds all of it. A state is saved by `torch.distributed.checkpoint`: each process writes
what it holds, and another number of processes can read it. Its files hold pickles, which can run code: open
only your own.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from minivlm.distributed.agreement import is_first
from minivlm.distributed.places import Place
from minivlm.errors import InputError
from minivlm.files import write_aside

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(model: nn.Module, blocks: Iterable[nn.Module], place: Place, bf16: bool = False) -> nn.Module:
    """Divide the weights of a model among processes. Its optimizer has to be made afterwards.

    Only the first process needs weights; the others may have built the model on the meta device. What is
    computed has to pass through the model's own `forward`, which gathers what no block holds.

    Args:
        blocks: modules that are gathered as a whole; the fewer weights each has, the less memory is needed.
        bf16: compute in bf16, with weights and sums of gradients in fp32.

    Returns: a copy of the model without weights, for `gathered`.
    """
    device = _device(place)
    weights = model.state_dict() if is_first(place) else {}
    model.to("meta")
    gc.collect()
    hull = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = DeviceMesh.from_group(place.group, device.type)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    for module in model.modules():  # buffers that are in no file
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
    set_model_state_dict(model, weights, options=FROM_FIRST)
    del weights
    gc.collect()  # whole weights may be part of a cycle, and would stay for long
    return hull


def _device(place: Place) -> torch.device:
    """Where gloo or NCCL expects tensors of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gathered(model: nn.Module, hull: nn.Module, place: Place) -> nn.Module | None:
    """The whole model on the CPU of the first process; None in the others, which all have to call this."""
    weights = {}
    for name, part in model.state_dict().items():
        tensor = whole(part)
        if is_first(place):
            weights[name] = tensor.cpu()
    if not is_first(place):
        return None
    hull.load_state_dict(weights, assign=True)
    return hull


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is divided, or was computed from divided ones, such as the norm of all gradients."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(
    about: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    unlogged: Sequence[Mapping[str, float]],
    place: Place,
) -> None:
    """Write a state: each process what it holds, beside `about`, which then says what folder counts.

    Raises InputError: one of them cannot write.
    """
    folder = about.parent / f"state-{step}"
    try:
        save(_tensors(model, optimizer), checkpoint_id=folder, process_group=place.group)
    except CheckpointException as error:
        if is_first(place):
            shutil.rmtree(folder, ignore_errors=True)
        rank, (reason, _) = next(iter(error.failures.items()))
        told = str(getattr(reason, "strerror", None) or reason).splitlines()[0]
        raise InputError(
            f"process {rank} of {place.size} cannot write {folder} ({told}): free some space"
        ) from error
    if is_first(place):
        values = {"step": step, "config": dict(config), "unlogged": list(unlogged)}
        with write_aside(about) as temporary:
            temporary.write_text(json.dumps(values), encoding="utf-8")
        for old in about.parent.glob("state-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def load_shards(
    about: Path, model: nn.Module, optimizer: torch.optim.Optimizer, place: Place
) -> tuple[int, dict[str, Any], list[dict[str, float]]]:
    """Put the state back, whatever the number of processes that wrote it: step, config, unlogged losses.

    Raises InputError: it cannot be read.
    """
    try:
        values = json.loads(about.read_text(encoding="utf-8"))
        tensors = _tensors(model, optimizer)
        load(tensors, checkpoint_id=about.parent / f"state-{values['step']}", process_group=place.group)
    except (OSError, ValueError, CheckpointException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{about} cannot be read ({reason}): start a new run in another folder") from error
    set_model_state_dict(model, tensors["model"])
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
    return values["step"], values["config"], values["unlogged"]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
