"""Where this process stands among the others, what they must agree on, and what it says when one is gone.

A process that waits for another one learns nothing about the reason. Two habits keep it from waiting for
ever: sizes are compared before anything is exchanged, and every wait ends, at the latest after the timeout
with which the process group was made (`torch.distributed.init_process_group(timeout=...)`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExchangeError(RuntimeError):
    """An exchange with other processes came to no end: one of them stopped, or is too far behind."""


@dataclass(frozen=True)
class Place:
    """This process in a group: its number `rank`, out of `size`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def neighbor(self, steps: int) -> int:
        """The process so many places to the right (negative: to the left), by its number in the world.

        The last one's right neighbor is the first: the places form a ring.
        """
        return dist.get_global_rank(self.group, (self.rank + steps) % self.size)

    @contextmanager
    def exchanging(self, what: str) -> Iterator[None]:
        """Around communication only: what goes wrong inside is the connection's fault.

        Raises ExchangeError instead of the backend's error, which names a port and not a reason.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ExchangeError(
                f"process {self.rank} of {self.size} waited in vain for {what}: another process stopped, or "
                "is behind by more than the timeout of the process group. Read the first error of the other "
                f"processes, and start all of them again (here it looked like this: {reason})"
            ) from error


def here(group: dist.ProcessGroup | None = None) -> Place | None:
    """The place of this process in the group (None: in the world), or None where it works alone.

    Alone is a process that has initialized no process group, or whose group has no other member.

    Raises RuntimeError: a launcher has started several processes (the variable WORLD_SIZE says so), but there
    is no process group. Each of them would train on its own, and nobody would notice.
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
        raise ValueError("this process is not a member of the group: call the loss only in those that are")
    return place if place.size > 1 else None


def check_agreement(place: Place, image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Compare sizes, precision and the need for gradients with all other processes: 64 bytes from each.

    Without this, a longer batch of one process would hang all of them, or pass for a part of another's. On a
    GPU the comparison waits for the device, as does every `print(loss.item())`.

    Raises ValueError, in every process: they do not agree, or pictures and texts of one do not pair.
    """
    mine = torch.tensor([*_signature(image_embeds), *_signature(text_embeds)], device=text_embeds.device)
    everyone = [torch.empty_like(mine) for _ in range(place.size)]
    with place.exchanging("the sizes of the others"):
        dist.all_gather(everyone, mine, group=place.group)
    signatures = [signature.tolist() for signature in everyone]
    if any(signature != signatures[0] for signature in signatures):
        told = "; ".join(f"process {rank}: {_told(signature)}" for rank, signature in enumerate(signatures))
        raise ValueError(
            f"the processes bring different batches. {told}. All must be alike: drop the last, incomplete "
            "batch of an epoch (DataLoader(drop_last=True)), and use one model everywhere"
        )
    n, width, *_ = signatures[0][:4]
    m, text_width, *_ = signatures[0][4:]
    if n != m or n == 0:
        raise ValueError(f"{n} pictures and {m} texts in each process: row i of both must belong together")
    if width != text_width:
        raise ValueError(f"pictures of width {width} and texts of width {text_width}: expected one width")


def _signature(x: Tensor) -> list[int]:
    """Rows, width, precision, and whether a gradient will come back: without one nobody would send it."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        return [x.shape[0] if x.ndim else 0, -1, -1, 0]
    return [*x.shape, DTYPES.index(x.dtype), int(x.requires_grad and torch.is_grad_enabled())]


def _told(signature: list[int]) -> str:
    parts = []
    for name, (rows, width, dtype, grad) in (("pictures", signature[:4]), ("texts", signature[4:])):
        precision = str(DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "no matrix of floats"
        parts.append(f"{rows} {name} [{width}, {precision}{', with gradient' if grad else ''}]")
    return " and ".join(parts)
