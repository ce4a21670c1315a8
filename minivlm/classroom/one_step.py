"""One step of the shipped model in one process or in several, by hand, with DDP and with FSDP: notebook 21.

`minivlm.distributed.run` starts the processes, which cannot import the cells of a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minivlm.distributed.by_hand import average_gradients
from minivlm.distributed.parallel import Objective
from minivlm.distributed.places import here
from minivlm.models.load import load
from minivlm.speed.checkpointing import blocks_of

How = Literal["alone", "by hand", "DDP", "FSDP"]


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
