"""What a run of fine-tuning needs of memory, computed before it starts.

Weights, gradients and the two moments of AdamW are counted. What the backward pass needs of the forward pass
is measured on one row, the longest, and taken times the rows of a batch. It is an estimate: what a layer
needs for a moment, the pictures of the next batches and PyTorch itself come on top.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minivlm.checkpoints.devices import free_memory, gigabytes
from minivlm.data.samples import Sample, make_inputs
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor
from minivlm.processing.inputs import Inputs
from minivlm.speed.checkpointing import blocks_of
from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Embedding, Int8Linear

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
RETURNED = 2**20  # bytes of the smallest piece that goes back to the system as soon as it is freed


def return_freed_memory() -> None:
    """Let what tensors leave behind go back to the system at once, where glibc would keep it.

    From a freed piece of up to 32 MB, glibc learns that such pieces come and go, and keeps them in its heap.
    After one row of a large model that heap holds gigabytes between a few small pieces, and little that comes
    later fits in. What `mallopt` sets is for the whole process. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, RETURNED)


class Learns(Protocol):
    """What is asked of a run of fine-tuning."""

    @property
    def model(self) -> Answers:
        """What answers."""

    masters: nn.Module
    working: nn.Module
    processor: AnswerProcessor
    samples: Sequence[Sample]

    @property
    def rows_at_once(self) -> int:
        """Rows of a batch, those of the drawn world included."""

    def read(self, part: Inputs, learning: bool = False) -> Any:
        """Scores and loss of a batch."""


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    def told(self, device: torch.device) -> str:
        """A sentence or two."""
        parts = ", ".join(f"{_readable(value)} of {name}" for name, value in self._asdict().items())
        text = f"Training takes about {_readable(sum(self))} of memory on {device}: {parts}."
        free = free_memory(device)
        if free is not None and sum(self) > free:
            text += (
                f" That is more than the {gigabytes(free)} that are free: use smaller batches with "
                "--accumulate, --checkpointing, or --lora"
            )
        return text


def estimate(run: Learns, checkpointing: bool = False) -> Memory:
    """What a step of this run needs, before gradient checkpointing is put on.

    Raises InputError: as `make_inputs`.
    """
    model: Any = run.model
    modules = [model] if run.working in (model, run.masters) else [model, run.working]
    weights: dict[int, Tensor] = {
        id(one): one for module in (*modules, run.masters) for one in module.parameters()
    }
    for part in model.modules():
        if isinstance(part, Int4Linear | Int8Linear | Int8Embedding):  # their weights are buffers
            weights |= {id(one): one for one in part.buffers()}
    trained = sum(one.numel() * 4 for one in run.masters.parameters() if one.requires_grad)
    kept, inputs, blocks = _activations(run)
    one_row = inputs + kept // max(blocks, 1) if checkpointing and blocks else kept
    return Memory(
        sum(one.numel() * one.element_size() for one in weights.values()),
        trained,
        2 * trained,
        one_row * run.rows_at_once,
    )


def _activations(run: Learns) -> tuple[int, int, int]:
    """Bytes that the backward pass of a row needs, bytes of all inputs of blocks, and how many these are."""
    longest = max(run.samples, key=lambda one: (len(one.paths), len(one.prefix) + len(one.suffix)))
    known = {one.untyped_storage().data_ptr() for one in (*run.working.parameters(), *_parameters(run))}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    blocks = list(blocks_of(_parent(run)))
    entering: list[int] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        entering.extend(one.nbytes for one in args[:1] if isinstance(one, Tensor))

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = run.read(make_inputs(run.processor, [longest]), learning=True)
            del output  # what was saved has its place until here, so no address came twice
    finally:
        for handle in handles:
            handle.remove()
    return sum(seen.values()), sum(entering), len(blocks)


def _parameters(run: Learns) -> list[nn.Parameter]:
    model: Any = run.model
    return list(model.parameters())


def _parent(run: Learns) -> nn.Module:
    """What holds the blocks that learn: the copy that computes, or the model that wears the adapter."""
    model: Any = run.model
    return run.working if any(True for _ in blocks_of(run.working)) else model


def _readable(number: int) -> str:
    return gigabytes(number) if number >= 1e8 else f"{number / 1e6:.0f} MB"
