"""What collectives, DDP and FSDP do, in a few lines each: to be read, and compared with PyTorch's own.

A collective is an exchange in which every process of a group takes part. Three of them carry nearly all of
training in several processes. Of four processes with four pieces each (P. Patarasuk and X. Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002, show that no sum over processes sends less than the ring):

    process 0   a0 a1 a2 a3       reduce-scatter: process r gets piece r of the sum, a_r + b_r + c_r + d_r
    process 1   b0 b1 b2 b3       all-gather: the piece of each process comes to all of them
    process 2   c0 c1 c2 c3       all-reduce: the sum comes to all; one after the other of these two
    process 3   d0 d1 d2 d3

Here everything travels around a ring by `isend` and `irecv`, one piece at a time, and the bytes are counted.
Training uses PyTorch's (parallel.py and sharded.py), which are equal, and do not wait for each piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Ring:
    """This process, its neighbors, and how many bytes it has sent."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sent = 0
        self.film: list[Tensor] = []  # what this process held after each round

    def pass_on(self, x: Tensor) -> Tensor:
        """Send to the right neighbor; return what comes from the left one."""
        arrived = torch.empty_like(x)
        to_right = dist.P2POp(dist.isend, x, (self.rank + 1) % self.size)
        from_left = dist.P2POp(dist.irecv, arrived, (self.rank - 1) % self.size)
        for request in dist.batch_isend_irecv([to_right, from_left]):
            request.wait()
        self.sent += x.nbytes
        return arrived


def reduce_scatter(pieces: Tensor, ring: Ring) -> Tensor:
    """Pieces [W, ...] of each process, added up in place -> the sum of piece r, in process r."""
    for step in range(1, ring.size):
        row = (ring.rank - step - 1) % ring.size
        pieces[row] += ring.pass_on(pieces[(row + 1) % ring.size])
        ring.film.append(pieces.clone())
    return pieces[ring.rank]


def all_gather(pieces: Tensor, ring: Ring) -> Tensor:
    """Pieces [W, ...], of which process r has the r-th -> all of them, in place, in every process."""
    for step in range(1, ring.size):
        row = (ring.rank - step) % ring.size
        pieces[row] = ring.pass_on(pieces[(row + 1) % ring.size])
        ring.film.append(pieces.clone())
    return pieces


def all_reduce(pieces: Tensor, ring: Ring) -> Tensor:
    """Pieces [W, ...] of each process -> their sums, in place, in every process."""
    reduce_scatter(pieces, ring)
    return all_gather(pieces, ring)


def all_reduce_at_one(x: Tensor) -> tuple[Tensor, int]:
    """Everybody sends to process 0, which adds up and answers. The sum, and the bytes that were sent."""
    size, total = dist.get_world_size(), x.clone()
    if dist.get_rank() > 0:
        dist.send(x, 0)
        dist.recv(total, 0)
        return total, x.nbytes
    for other in range(1, size):
        dist.recv(arrived := torch.empty_like(x), other)
        total += arrived
    for other in range(1, size):
        dist.send(total, other)
    return total, (size - 1) * x.nbytes


def average_gradients(model: nn.Module) -> None:
    """After `backward`, in every process: what DistributedDataParallel does during it."""
    for weight in model.parameters():
        if weight.grad is not None:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


class Gathered(Function):
    """A matrix of which each process has some rows: all rows forward, and a share of the gradient back.

    What FSDP does for a layer, with one difference: autograd keeps the whole matrix for the backward pass,
    where FSDP lets go of it and gathers it again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        pieces = rows.new_empty(ring.size, *rows.shape)
        pieces[ring.rank] = rows
        return all_gather(pieces, ring).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pieces = torch.stack(grad.chunk(ctx.ring.size))
        return reduce_scatter(pieces, ctx.ring) / ctx.ring.size, None
