"""This process's place among the others, what all must agree on, and what it reports when one is gone.

A process that waits for another never learns why. Two rules keep it from waiting forever: sizes are compared
before anything is exchanged, and every wait ends at the latest after the timeout of the process group
(`torch.distributed.init_process_group(timeout=...)`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# How errors of gloo and NCCL can be told from others.
FROM_BACKEND = re.compile(
    "gloo|NCCL|ProcessGroup|Connection (closed|reset)|Broken pipe|Timed out", re.IGNORECASE
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExchangeError(RuntimeError):
    """An exchange with other processes did not finish: one of them stopped, or is too far behind."""


@dataclass(frozen=True)
class Place:
    """This process in a group: `rank` out of `size`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def neighbor(self, steps: int) -> int:
        """The global rank of the process that many places to the right (negative: to the left).

        The places form a ring: the right neighbor of the last is the first.
        """
        return dist.get_global_rank(self.group, (self.rank + steps) % self.size)

    @contextmanager
    def exchanging(self, what: str) -> Iterator[None]:
        """Wrap communication only: any error inside is the connection's fault.

        Raises ExchangeError instead of the backend's error, which names a port rather than a reason.
        """
        try:
            yield
        except RuntimeError as error:
            raise ExchangeError(self.in_vain(what, error)) from error

    def in_vain(self, what: str, error: Exception) -> str:
        """What to tell of an exchange that did not finish."""
        line = str(error).splitlines()[0]  # gloo begins with a line of its own source, and ends with advice
        reason = re.sub(r"^\[\S*\] ", "", line).partition(". This is typically")[0]
        return (
            f"process {self.rank} of {self.size} waited in vain for {what}: another process stopped, or "
            "is behind by more than the timeout of the process group. Read the first error of the "
            f"other processes, then restart all of them (the error here: {reason})"
        )


def gave_up(place: Place | None, error: Exception) -> str | None:
    """What to tell of an error in a training step if it is an exchange that did not finish, or None.

    DistributedDataParallel exchanges gradients in the middle of the backward pass, where any error may arise.
    """
    if isinstance(error, ExchangeError):
        return str(error)
    if place is None or not FROM_BACKEND.search(str(error)):
        return None
    return place.in_vain("the gradients of the others", error)


def here(group: dist.ProcessGroup | None = None) -> Place | None:
    """The place of this process in the group (None means all processes), or None if it works alone.

    A process is alone if it has initialized no process group, or if its group has no other member.

    Raises:
        RuntimeError: a launcher has started several processes (WORLD_SIZE says so), but there is no process
            group. Each of them would train on its own, unnoticed.
        ValueError: this process is not a member of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        started = os.environ.get("WORLD_SIZE", "1")
        if started != "1":
            raise RuntimeError(
                f"WORLD_SIZE is {started}, but this process belongs to no process group: "
                "call torch.distributed.init_process_group() before the loss"
            )
        return None
    found = group or dist.group.WORLD
    assert found is not None
    place = Place(found, dist.get_rank(found), dist.get_world_size(found))
    if place.rank < 0:
        raise ValueError("this process is not a member of the group: call the loss only in its members")
    return place if place.size > 1 else None


def check_agreement(place: Place, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Compare sizes, dtype and the need for gradients with all other processes: 64 bytes from each.

    Without this, a longer batch in one process would hang all of them, or be taken for part of another's
    batch. On a GPU the comparison waits for the device, as every `print(loss.item())` does.

    Raises ValueError, in every process: they do not agree, or pictures and texts do not form pairs.
    """
    mine = torch.tensor([*_signature(image_embeds), *_signature(text_embeds)], device=text_embeds.device)
    everyone = [torch.empty_like(mine) for _ in range(place.size)]
    with place.exchanging("the sizes of the others"):
        dist.all_gather(everyone, mine, group=place.group)
    signatures = [signature.tolist() for signature in everyone]
    if any(signature != signatures[0] for signature in signatures):
        told = "; ".join(f"process {rank}: {_told(signature)}" for rank, signature in enumerate(signatures))
        raise ValueError(
            f"the processes have different batches. {told}. All must be the same: drop the last, incomplete "
            "batch of an epoch (DataLoader(drop_last=True)), and use the same model everywhere"
        )
    n, width, *_ = signatures[0][:4]
    m, text_width, *_ = signatures[0][4:]
    if n != m or n == 0:
        raise ValueError(
            f"{n} pictures and {m} texts in each process: expected the same number of both, at least 1"
        )
    if width != text_width:
        raise ValueError(
            f"pictures of width {width} and texts of width {text_width}: expected the same width"
        )


def _signature(x: Tensor) -> list[int]:
    """Rows, width, dtype, and whether a gradient will flow back: if not, this process would not send one."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        return [x.shape[0] if x.ndim else 0, -1, -1, 0]
    return [*x.shape, DTYPES.index(x.dtype), int(x.requires_grad and torch.is_grad_enabled())]


def _told(signature: list[int]) -> str:
    parts = []
    for name, (rows, width, dtype, grad) in (("pictures", signature[:4]), ("texts", signature[4:])):
        precision = str(DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "not a matrix of floats"
        parts.append(f"{rows} {name} [{width}, {precision}{', with gradient' if grad else ''}]")
    return " and ".join(parts)
