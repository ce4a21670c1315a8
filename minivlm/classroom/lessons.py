"""What notebook 21 runs in each of several real processes, which cannot import the cells of a notebook.

`minivlm.distributed.run` starts the processes, calls one of these functions in each, and ends them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minivlm.distributed.by_hand import Gathered, Ring, all_reduce, all_reduce_at_one, average_gradients
from minivlm.distributed.parallel import Objective
from minivlm.distributed.places import here
from minivlm.distributed.torchrun import joined
from minivlm.models.load import load
from minivlm.speed.checkpointing import blocks_of
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.folder import holds_state
from minivlm.training.loop import Loop

How = Literal["alone", "by hand", "DDP", "FSDP"]


class Collectives(NamedTuple):
    """What this process has after each collective of PyTorch."""

    all_reduce: Tensor
    all_gather: Tensor
    reduce_scatter: Tensor


def collectives(vectors: Tensor) -> Collectives:
    """Process r begins with row r of the vectors [W, n]."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = vectors[rank]
    reduced, gathered, piece = own.clone(), own.new_empty(size * len(own)), own.new_empty(len(own) // size)
    dist.all_reduce(reduced)
    # Newer versions of PyTorch have new names for these two.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(gathered, own.clone())
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(piece, own.clone())
    return Collectives(reduced, gathered, piece)


class Summed(NamedTuple):
    """A sum over processes, made by hand."""

    total: Tensor
    sent: int  # bytes
    film: list[Tensor]  # what this process held after each round, [W, n / W] each


def sum_in_ring(vectors: Tensor) -> Summed:
    """Process r begins with row r of the vectors [W, n]; each row is cut into W pieces."""
    ring = Ring()
    pieces = vectors[ring.rank].view(ring.size, -1).clone()
    return Summed(all_reduce(pieces, ring).flatten(), ring.sent, ring.film)


def sum_at_one(vectors: Tensor) -> Summed:
    """The same by way of process 0."""
    total, sent = all_reduce_at_one(vectors[dist.get_rank()])
    return Summed(total, sent, [])


class Met(NamedTuple):
    """What a process saw of texts that travel."""

    owners: list[int]  # whose texts it held, in order
    sent: int  # bytes


def texts_around(texts: Tensor) -> Met:
    """Every process begins with its part of the texts [n, D]; they go around the ring once."""
    ring = Ring()
    passing = texts.chunk(ring.size)[ring.rank].clone()
    owners = [ring.rank]
    for step in range(1, ring.size):
        passing = ring.pass_on(passing)
        owners.append((ring.rank - step) % ring.size)
    return Met(owners, ring.sent)


class Step(NamedTuple):
    """What a process has after a step of training."""

    loss: float  # of its own rows
    gradient: Tensor  # of all weights, one after the other
    weights: Tensor  # likewise, after the step
    held: int  # bytes of weights and gradients that this process keeps between steps


def step(
    batches: Sequence[Mapping[str, Any]], how: How, shares: Sequence[float] | None = None, lr: float = 0.1
) -> Step:
    """One step of SGD with the shipped model, in which process r reads batch r.

    Args:
        shares: by how much the loss of each process counts, 1 in all; None: all count the same.
    """
    torch.set_num_threads(1)
    model, _ = load()
    place = here()
    rank = 0 if place is None else place.rank

    def loss() -> Tensor:
        found: Tensor = model(**batches[rank]).loss
        return found

    compute: Any = loss
    if place is not None and how == "DDP":
        compute = DistributedDataParallel(Objective(model, loss), process_group=place.group)
    elif place is not None and how == "FSDP":
        from minivlm.distributed.sharded import shard  # takes a second

        shard(model, blocks_of(model), place)
    value = compute()
    # Gradients are averaged over W processes, so a share has to be W times as large.
    (value if shares is None else value * shares[rank] * len(batches)).backward()
    if how == "by hand":
        average_gradients(model)
    learned = [weight.detach() for weight in model.parameters() if weight.grad is not None]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for weight, gradient in zip(learned, gradients, strict=True):
        weight -= lr * gradient
    held = sum(_own(x).nbytes for x in (*learned, *gradients))
    return Step(value.item(), _flat(gradients), _flat(learned), held)


def _own(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be divided."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _flat(tensors: Sequence[Any]) -> Tensor:
    """All numbers in a row; parts of divided tensors are gathered."""
    return torch.cat([(x.full_tensor() if hasattr(x, "full_tensor") else x).flatten() for x in tensors])


class Divided(NamedTuple):
    """What a process has after forward and backward through a divided layer."""

    loss: float  # of its own rows of data
    gradient: Tensor  # of its own rows of the weight
    sent: int  # bytes


def divided_linear(weight: Tensor, x: Tensor, y: Tensor) -> Divided:
    """A linear layer [out, in] of which each process holds some rows, and its share of the data [n, in]."""
    ring = Ring()
    own = weight.chunk(ring.size)[ring.rank].clone().requires_grad_()
    inputs, targets = (z.chunk(ring.size)[ring.rank] for z in (x, y))
    whole = Gathered.apply(own, ring)
    loss = F.mse_loss(F.linear(inputs, whole), targets)
    loss.backward()
    assert own.grad is not None
    return Divided(loss.item(), own.grad, ring.sent)


# The smallest training that the package has: seconds on one core.
TOWERS = ContrastiveConfig(
    "siglip", image_size=16, tower_width=16, tower_layers=1, tower_heads=2, text_width=16, text_layers=1,
    text_heads=2, max_length=28, steps=60, batch_size=8, warmup_steps=5, lr=2e-3, bf16=False,
)  # fmt: skip
OFTEN = Loop(save_every=10, log_every=2, measure_every=0, workers=0, progress=False)


def train_towers(out: Path) -> None:
    """Two towers with SigLIP's loss, from the start or from what was saved, alone or with other processes."""
    torch.set_num_threads(1)
    with joined():
        train_contrastive(out, TOWERS, loop=replace(OFTEN, resume=holds_state(out)))


def train_quietly(out: Path) -> None:
    """The same in a process whose warnings would stand in a notebook: DDP says that all weights are used."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train_towers(out)
