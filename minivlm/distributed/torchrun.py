"""A process that `torchrun` has started joins the others, and leaves them.

    torchrun --nproc-per-node 4 -m minivlm train --out runs/tiny

`torchrun` starts the processes, tells each its number in the environment (RANK, WORLD_SIZE, LOCAL_RANK),
ends all of them when one fails, and with --max-restarts starts all of them again. Nothing of that is done
here: https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minivlm.distributed.places import ExchangeError, Place, here
from minivlm.errors import InputError

TIMEOUT = 600.0  # seconds that a process waits for another


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[Place | None]:
    """Be one of the processes that `torchrun` has started; its place, or None if it was started alone.

    Args:
        timeout: seconds that this process waits for another before it gives up.

    Raises InputError: the others do not come, or one of them is gone in the middle of an exchange.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        # Processes that are started again may find the addresses of those before them in the same store.
        store = PrefixStore(f"start-{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the processes do not find each other ({reason}): check that all nodes were started with the "
            "same --nnodes, --rdzv-endpoint and --rdzv-id"
        ) from error
    try:
        yield here()
    except ExchangeError as error:
        raise InputError(str(error)) from error
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device | str) -> torch.device:
    """With several GPUs in a machine, each of its processes has its own."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None or not dist.is_torchelastic_launched():
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def restarts() -> int:
    """How often `torchrun` has started the processes again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
