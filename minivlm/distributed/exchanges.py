"""Four ways for every process to see the texts of all others, with gradients.

For the sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343, section 3.3): pictures stay, texts travel.
Every process has its own texts [b, D] and needs those of W - 1 others. open_clip offers the same four:

    exchange        rounds           drawn below for 3 processes with texts A, B, C
    bidirectional   ceil((W-1)/2)    a ring, in both directions at once
    shift           W - 1            a ring, in one direction
    reduce          W                one after the other sends to all
    gather          1                all send to all

Each function here is a generator of pairs (owner, texts), including the process's own texts, so that a loss
can be computed from one block before the next is fetched. `costs.py` counts what each of them sends.

In the backward pass the gradient travels the other way: what process 0 computes for the texts of process 2
goes back to process 2. What arrives there is a sum over all W processes, not a mean.

Communication is part of autograd's graph. If one process skips a node, all others wait for it. Every process
must take all blocks, use each of them, and call `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minivlm.distributed.places import Place

Blocks = Iterator[tuple[int, Tensor]]  # rank of the process they belong to, texts [b, D]
Exchange = Callable[[Tensor, Place], Blocks]


def bidirectional(texts: Tensor, place: Place) -> Blocks:
    """A ring, in both directions at once: half as many rounds as `shift`, for the same number of bytes.

             ┌─────────────────────┐
             ▼                     ▼
            (0) ◄──────► (1) ◄──► (2)        round 1:  0 gets C from its left, B from its right

    With 4 processes, the one opposite is left over after round 1: its texts come in a round of `shift`.
    """
    yield place.rank, texts
    to_left = to_right = texts
    pairs, one_left = divmod(place.size - 1, 2)
    for step in range(1, pairs + 1):
        to_right, to_left = _Both.apply(to_left, to_right, place)  # what came from the left goes on right
        yield (place.rank - step) % place.size, to_right
        yield (place.rank + step) % place.size, to_left
    if one_left:
        yield (place.rank - pairs - 1) % place.size, _Shift.apply(to_right, place)


def shift(texts: Tensor, place: Place) -> Blocks:
    """A ring, in one direction: each process passes on to the right what came from the left.

    (0) ──A──► (1) ──B──► (2) ──C──┐     round 1:  0 gets C        (0) ──C──► (1) ──A──► ...
     ▲                             │     round 2:  0 gets B
     └─────────────────────────────┘
    """
    for step in range(place.size):
        yield (place.rank - step) % place.size, texts
        if step < place.size - 1:
            texts = _Shift.apply(texts, place)


def reduce(texts: Tensor, place: Place) -> Blocks:
    """One after the other sends to all: a sum over processes, to which all but the owner add zeros.

            (0)  A              (0)  0              (0)  0
            (1)  0  ─ sum ► A   (1)  B  ─ sum ► B   (1)  0  ─ sum ► C
            (2)  0              (2)  0              (2)  C
             round 1             round 2             round 3

    A sum over W processes costs twice the bytes of passing a tensor on. The owner takes its own texts from
    the sum too: if it left the sum unused, there would be no backward pass there, and the others would wait
    for it.
    """
    for owner in range(place.size):
        yield owner, _Sum.apply(texts * (owner == place.rank), place)


def gather(texts: Tensor, place: Place) -> Blocks:
    """All send to all, in one round: the whole [W * b, D] is in memory before the first block is used.

    (0)  A             (0)  A B C            (0)  a b c                (0)  a + a + a
    (1)  B  ─ gather ► (1)  A B C  backward: (1)  a b c  ─ to owners ► (1)  b + b + b
    (2)  C             (2)  A B C            (2)  a b c                (2)  c + c + c
    """
    yield from enumerate(_Gather.apply(texts, place))


def gather_rows(x: Tensor, place: Place, with_grad: bool) -> Tensor:
    """The rows of all processes, in the order of their ranks. [b, D] -> [W * b, D]

    Without gradients the rows are constants, and nothing is sent back in the backward pass.
    """
    if with_grad:
        return torch.cat(_Gather.apply(x, place))
    return torch.cat(_gather(x.detach(), place))


EXCHANGES: tuple[Exchange, ...] = (bidirectional, shift, reduce, gather)


# ---- the same with a backward pass -------------------------------------------------------------------------


class _Shift(Function):
    """Send to the right; the gradient goes to the left."""

    @staticmethod
    def forward(ctx: Any, texts: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return _move(place, (texts, 1))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _move(ctx.place, (grad, -1))[0], None


class _Both(Function):
    """Send to both sides; gradients go back to the side the texts came from, with the same exchange."""

    @staticmethod
    def forward(ctx: Any, to_left: Tensor, to_right: Tensor, place: Place) -> tuple[Tensor, ...]:
        ctx.place = place
        from_right, from_left = _move(place, (to_left, -1), (to_right, 1))
        return from_left, from_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_from_left: Tensor, grad_from_right: Tensor) -> tuple[Tensor, Tensor, None]:
        # What I sent to the right comes back from the right, where it was the neighbor's "from the left".
        of_to_right, of_to_left = _move(ctx.place, (grad_from_left, -1), (grad_from_right, 1))
        return of_to_left, of_to_right, None


class _Sum(Function):
    """The sum over processes. Each term is part of every process's sum, so its gradient is a sum again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return _sum(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.place), None


class _Gather(Function):
    """All send to all; in the backward pass every gradient goes to its owner, which adds up what it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> tuple[Tensor, ...]:
        ctx.place = place
        return tuple(_gather(x, place))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        place: Place = ctx.place
        parts = torch.stack(grads)  # [W, b, D], one part for each process
        found = torch.empty_like(parts)  # [W, b, D], one part from each process
        with place.exchanging("the gradients of the others"):
            dist.all_to_all_single(found, parts, group=place.group)
        return found.sum(dim=0), None


# ---- communication -----------------------------------------------------------------------------------------


def _move(place: Place, *moves: tuple[Tensor, int]) -> list[Tensor]:
    """Send each tensor that many places to the right; return what arrives from the other side, in order."""
    operations, arrived = [], []
    for x, steps in moves:
        x = x.contiguous()
        arrived.append(torch.empty_like(x))
        operations.append(dist.P2POp(dist.isend, x, place.neighbor(steps), place.group))
        operations.append(dist.P2POp(dist.irecv, arrived[-1], place.neighbor(-steps), place.group))
    with place.exchanging("a neighbor in the ring"):
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return arrived


def _sum(x: Tensor, place: Place) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with place.exchanging("the sum over all processes"):
        dist.all_reduce(total, group=place.group)
    return total


def _gather(x: Tensor, place: Place) -> list[Tensor]:
    x = x.contiguous()
    everyone = [torch.empty_like(x) for _ in range(place.size)]
    with place.exchanging("the rows of the others"):
        dist.all_gather(everyone, x, group=place.group)
    return everyone
