"""Four ways in which every process gets to see the texts of all others, with gradients.

For the sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343, section 3.3): pictures stay, texts travel.
Every process has its own texts [b, D] and W - 1 others to meet. open_clip offers the same four:

    exchange        rounds           drawn for 3 processes with texts A, B, C
    bidirectional   ceil((W-1)/2)    a ring, both ways at once
    shift           W - 1            a ring, one way
    reduce          W                one after the other tells all
    gather          1                all tell all

Each function here is a generator of pairs (owner, texts), own texts included, so that a loss can be computed
from a block before the next one is fetched. `costs.py` counts what each of them sends.

Backward, the gradient travels the other way: what process 0 finds about the texts of process 2 goes back to
process 2. A sum arrives there, over all W processes, and not a mean.

Communication is part of autograd's graph. If one process leaves out a node, all others wait for it: every
process has to take all blocks, use each of them, and call `backward`.
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

Blocks = Iterator[tuple[int, Tensor]]  # number of the process they belong to, texts [b, D]
Exchange = Callable[[Tensor, Place], Blocks]


def bidirectional(texts: Tensor, place: Place) -> Blocks:
    """A ring, both ways at once: half as many rounds as `shift`, for the same number of bytes.

             ┌─────────────────────┐
             ▼                     ▼
            (0) ◄──────► (1) ◄──► (2)        round 1:  0 gets C from its left, B from its right

    Of 4 processes one is left over after round 1, the one opposite: it comes in a round of `shift`.
    """
    yield place.rank, texts
    to_left = to_right = texts
    pairs, one_left = divmod(place.size - 1, 2)
    for step in range(1, pairs + 1):
        to_right, to_left = _Both.apply(to_left, to_right, place)  # from the left, and on to the right
        yield (place.rank - step) % place.size, to_right
        yield (place.rank + step) % place.size, to_left
    if one_left:
        yield (place.rank - pairs - 1) % place.size, _Shift.apply(to_right, place)


def shift(texts: Tensor, place: Place) -> Blocks:
    """A ring, one way: everyone passes on to the right what came from the left.

    (0) ──A──► (1) ──B──► (2) ──C──┐     round 1:  0 gets C        (0) ──C──► (1) ──A──► ...
     ▲                             │     round 2:  0 gets B
     └─────────────────────────────┘
    """
    for step in range(place.size):
        yield (place.rank - step) % place.size, texts
        if step < place.size - 1:
            texts = _Shift.apply(texts, place)


def reduce(texts: Tensor, place: Place) -> Blocks:
    """One after the other tells all: a sum over processes, to which only the owner adds more than zeros.

            (0)  A              (0)  0              (0)  0
            (1)  0  ─ sum ► A   (1)  B  ─ sum ► B   (1)  0  ─ sum ► C
            (2)  0              (2)  0              (2)  C
             round 1             round 2             round 3

    A sum of W tensors costs twice the bytes of passing one on. The owner takes its own texts from the sum
    too: a sum that it leaves unused would have no backward pass there, and the others would wait for it.
    """
    for owner in range(place.size):
        yield owner, _Sum.apply(texts * (owner == place.rank), place)


def gather(texts: Tensor, place: Place) -> Blocks:
    """All tell all, in one round: the whole [W * b, D] is in memory before the first block is used.

    (0)  A             (0)  A B C            (0)  a a a            (0)  a + a + a
    (1)  B  ─ gather ► (1)  A B C  backward: (1)  b b b  where     (1)  b + b + b
    (2)  C             (2)  A B C            (2)  c c c  it ends   (2)  c + c + c
    """
    yield from enumerate(_Gather.apply(texts, place))


def gather_rows(x: Tensor, place: Place, with_grad: bool) -> Tensor:
    """The rows of all processes, in the order of their numbers. [b, D] -> [W * b, D]

    Without gradients they are numbers, nothing goes back through them, and nothing is sent back.
    """
    if with_grad:
        return torch.cat(_Gather.apply(x, place))
    return torch.cat(_gather(x.detach(), place))


EXCHANGES: tuple[Exchange, ...] = (bidirectional, shift, reduce, gather)


# ---- the same, backward ------------------------------------------------------------------------------------


class _Shift(Function):
    """To the right; the gradient to the left."""

    @staticmethod
    def forward(ctx: Any, texts: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return _move(place, (texts, 1))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _move(ctx.place, (grad, -1))[0], None


class _Both(Function):
    """To both sides; gradients go back to the side that the texts came from, with the same exchange."""

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
    """The sum over processes. Each term has part in every process's sum: its gradient is a sum again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return _sum(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.place), None


class _Gather(Function):
    """All tell all; then each sends every gradient to the process it belongs to, which adds what it gets."""

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
    """Send each tensor so many places to the right; what arrives there from the other side, in this order."""
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
