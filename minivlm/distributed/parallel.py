"""Data-parallel training: each process computes a share of every batch, and all take the same step.

A loss is a sum over rows, and so is its gradient. W processes compute the sums of their own rows, W times at
once. PyTorch's DistributedDataParallel (S. Li et al., 2020, https://arxiv.org/abs/2006.15704) averages the
gradients while the backward pass still computes, and starts all processes with the weights of the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minivlm.distributed.places import Place


class Objective(nn.Module):
    """A loss as the forward pass of a module.

    DistributedDataParallel sees what passes through `forward`. Our losses call parts of a model by
    themselves, so that the loss, and not the model, is what has to be wrapped.
    """

    def __init__(self, learns: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.learns = learns
        self.loss = loss

    def forward(self, *inputs: Any) -> Any:
        return self.loss(*inputs)


def data_parallel(learns: nn.Module, loss: Callable[..., Any], place: Place) -> Callable[..., Any]:
    """The same loss of this process's rows, whose gradients are averaged over processes.

    A weight that no row of the batch needs, such as an expert that no word was sent to, is left without a
    gradient, as in one process (`find_unused_parameters`). Buffers are constants here, and not exchanged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`broadcast_buffers` is deprecated"
        )  # not in all versions of PyTorch
        return DistributedDataParallel(
            Objective(learns, loss),
            process_group=place.group,
            find_unused_parameters=True,
            broadcast_buffers=False,
        )


def backward(place: Place | None, share: Tensor) -> None:
    """The gradient of a loss of which each process has computed a share: the loss is the sum of all shares.

    What is averaged over W processes has to be W times as large.
    """
    (share if place is None else share * place.size).backward()


def without_exchange(compute: Callable[..., Any], more_to_come: bool) -> AbstractContextManager[Any]:
    """Gradients stay in this process while more of the same step are to come, and are averaged at its end."""
    if more_to_come and isinstance(compute, DistributedDataParallel):
        return compute.no_sync()
    return nullcontext()
