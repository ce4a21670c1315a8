"""What tests/test_distributed.py runs in real processes: functions that a new process can import."""

from __future__ import annotations

import math
import os
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minivlm import distributed
from minivlm.distributed import EXCHANGES
from minivlm.speed.chunked_loss import chunked_siglip_loss

N, D = 12, 8  # pairs in total: 2, 3 and 4 processes get equal parts
Found = dict[str, Tensor]  # loss and gradients by name


def tensors(n: int = N) -> dict[str, Tensor]:
    """The whole batch, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, D, generator=generator) * 3 for _ in range(2))
    return {
        "images": images,
        "texts": texts,
        "scale": torch.tensor([math.log(7.0)]),
        "bias": torch.tensor([-2.0]),
    }


def gradients(loss: Callable[..., Tensor], inputs: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> Found:
    """Gradients of a loss with respect to its inputs."""
    leaves = {name: x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()}
    value = loss(*leaves.values())
    value.backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": value.detach(), **found}


def share(n: int = N) -> dict[str, Tensor]:
    """The rows of this process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = tensors(n)
    return {name: x.chunk(size)[rank] if len(x) == n else x for name, x in whole.items()}


def message(function: Callable[[], Any]) -> str:
    """The error's type and message."""
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def all_cases() -> dict[str, Any]:
    """What this process finds, by name."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = share()
    pair = {name: mine[name] for name in ("images", "texts", "scale")}
    found: dict[str, Any] = {}
    for exchange in EXCHANGES:
        name = exchange.__name__
        loss = partial(distributed.siglip_loss, exchange=exchange)
        found[name] = gradients(loss, mine)
        found[f"{name}, chunked"] = gradients(partial(loss, block_loss=chunked_siglip_loss), mine)
        found[f"{name}, locked texts"] = gradients(loss, mine, ("texts",))
        found[f"{name}, one pair each"] = gradients(loss, share(size))
    for local, grad in product((False, True), repeat=2):
        loss = partial(distributed.clip_loss, local_loss=local, gather_with_grad=grad)
        found[f"clip {local} {grad}"] = gradients(loss, pair)
    one = {name: x for name, x in share(size).items() if name != "bias"}
    found["clip, one pair each"] = gradients(distributed.clip_loss, one)

    # Sizes that do not agree.
    images, texts, scale, bias = mine.values()
    fewer = slice(0, len(images) - (rank == 1))
    found["unequal"] = message(lambda: distributed.siglip_loss(images[fewer], texts[fewer], scale, bias))
    found["unequal, clip"] = message(lambda: distributed.clip_loss(images[fewer], texts[fewer], scale))
    found["unpaired"] = message(lambda: distributed.siglip_loss(images[fewer], texts, scale, bias))
    found["unpaired everywhere"] = message(lambda: distributed.clip_loss(images[1:], texts, scale))
    found["empty"] = message(lambda: distributed.siglip_loss(images[:0], texts[:0], scale, bias))
    found["widths"] = message(lambda: distributed.siglip_loss(images[:, 1:], texts, scale, bias))
    found["no matrix"] = message(
        lambda: distributed.clip_loss(images, texts[0] if rank == 1 else texts, scale)
    )
    low = texts.bfloat16() if rank == 1 else texts
    found["precision"] = message(lambda: distributed.siglip_loss(images, low, scale, bias))
    grad = texts.clone().requires_grad_(rank == 1)
    found["gradients"] = message(lambda: distributed.siglip_loss(images, grad, scale, bias))
    # With no_grad no process waits for gradients, whatever requires them.
    with torch.no_grad():
        found["no_grad"] = distributed.siglip_loss(images, grad, scale, bias)

    # A group of the last two processes: they share a batch, the others are no members.
    last = dist.new_group([size - 2, size - 1])
    if rank >= size - 2:
        found["group"] = gradients(lambda *x: distributed.siglip_loss(*x, group=last), mine)
    else:
        found["group"] = message(lambda: distributed.siglip_loss(images, texts, scale, bias, group=last))

    # A neighbor that is alive but does not show up.
    hasty = dist.new_group(timeout=timedelta(seconds=1))
    if rank == 1:
        time.sleep(2)
        found["late"] = "slept"
    else:
        start = time.monotonic()
        found["late"] = message(lambda: distributed.siglip_loss(images, texts, scale, bias, group=hasty))
        found["waited"] = time.monotonic() - start
    return found


def dies_in_the_middle(moment: str) -> str:
    """Process 1 ends between two exchanges; the others return what they see, or fail with it."""
    images, texts, scale, bias = share().values()
    texts.requires_grad_()
    exchange = distributed.shift

    def leaving(texts: Tensor, place: Any) -> Any:
        for number, block in enumerate(distributed.shift(texts, place)):
            yield block
            if number == 1:
                os._exit(3)

    if dist.get_rank() == 1 and moment == "forward":
        exchange = leaving  # type: ignore[assignment]
    loss = distributed.siglip_loss(images, texts, scale, bias, exchange=exchange)
    if dist.get_rank() == 1:
        os._exit(3)
    loss.backward()
    return "survived"


def fails_alone(rank: int) -> None:
    """One raises; the others wait for it in an exchange."""
    if dist.get_rank() == rank:
        raise KeyError("the data of this process")
    images, texts, scale, bias = share().values()
    distributed.siglip_loss(images, texts, scale, bias)


def hangs() -> None:
    """Process 0 returns, the others never do."""
    if dist.get_rank() > 0:
        time.sleep(100)


def alone() -> Found:
    """With a process group of one."""
    assert dist.get_world_size() == 1
    return gradients(distributed.siglip_loss, tensors())


def breaks_off(number: int) -> bytes:
    """Process 1 is stopped or killed in the middle of sending its result."""
    if dist.get_rank() == 1:
        send = Connection._send  # type: ignore[attr-defined]

        def half(self: Connection, content: bytes, *args: Any) -> None:
            send(self, content[: len(content) // 2], *args)
            os.kill(os.getpid(), number)

        Connection._send = half  # type: ignore[attr-defined]
    return bytes(10_000)


def returns_what_only_it_knows() -> Any:
    """An object of a class of a module that the parent cannot import."""
    module = types.ModuleType("known_in_the_child_only")
    sys.modules[module.__name__] = module
    kind = type("Kind", (), {"__module__": module.__name__})
    module.Kind = kind  # type: ignore[attr-defined]
    return kind()


def waits_for_the_end(folder: str) -> None:
    """Leaves its process id, and never returns."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(1000)
