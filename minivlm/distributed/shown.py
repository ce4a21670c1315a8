"""Collectives and a divided layer in each process that `run` starts, for notebook 21.

>>> import torch
>>> from minivlm.distributed import run
>>> [mine.all_reduce.tolist() for mine in run(2, collectives, torch.tensor([[1.0, 2.0], [10.0, 20.0]]))]
[[11.0, 22.0], [11.0, 22.0]]
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minivlm.distributed.by_hand import Gathered, Ring, all_reduce, all_reduce_at_one


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
