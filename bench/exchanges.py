"""What the four exchanges of the sigmoid loss send and hold, measured in real processes.

Run: OMP_NUM_THREADS=1 python bench/exchanges.py --out bench/results/exchanges.txt

Every process has its own batch; its pictures meet the texts of all. Measured at 2 to 4 processes on this
machine: the bytes that the kernel counts on a process's TCP connections, in the forward and in the backward
pass, and the most bytes that tensors hold at a time. Beside them stands what minivlm/distributed/costs.py
says, whose formulas also draw the figure: lines are formulas, points are measurements. A real run on many
machines was not made.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention import processor as name_of_cpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minivlm import distributed, losses
from minivlm.distributed import EXCHANGES, costs
from minivlm.distributed.exchanges import Exchange, bidirectional, gather, reduce
from minivlm.distributed.siglip import BlockLoss
from minivlm.speed.chunked_loss import chunked_siglip_loss

BATCH, WIDTH = 512, 64
CHUNK = 256  # the default of chunked_siglip_loss
SIZES = ((2, 512), (3, 512), (4, 128), (4, 256), (4, 512), (4, 1024))  # processes, pairs in each
CLIP = {"gradients gathered": True, "no gradients": False}
BLOCKS: dict[str, BlockLoss] = {"plain": losses.siglip_loss, "chunked": chunked_siglip_loss}


@dataclass(frozen=True)
class Found:
    """Of one process, in bytes."""

    sent: int
    received: int
    sent_back: int
    received_back: int
    peak: int


def traffic() -> tuple[int, int]:
    """Bytes sent and received so far on the TCP connections of this process, as the kernel counts them.

    Linux tells by getsockopt(TCP_INFO); elsewhere (0, 0) is returned.
    """
    sent = received = 0
    folder = Path("/proc/self/fd")
    for entry in os.listdir(folder) if folder.exists() else ():
        try:
            if not os.readlink(folder / entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # not TCP, or gone
            continue
        # struct tcp_info of linux/tcp.h: bytes received at 128, sent at 200, of these sent again at 208
        received += struct.unpack_from("=Q", info, 128)[0]
        total, again = struct.unpack_from("=QQ", info, 200)
        sent += total - again
    return sent, received


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, while they live; `peak` is the most at a time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def measure(loss: Callable[..., Tensor], batch: int, width: int) -> Found:
    """One loss and its backward pass, in this process of the group."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    images, texts = (torch.randn(batch, width, generator=generator).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor([value], requires_grad=True) for value in (2.0, -4.0))
    dist.barrier()
    with LiveBytes([images, texts, scale, bias]) as memory:
        start = traffic()
        value = loss(images, texts, scale, bias)
        dist.barrier()  # nothing is under way any more
        middle = traffic()
        value.backward()
        dist.barrier()
        end = traffic()
    forth = [after - before for before, after in zip(start, middle, strict=True)]
    back = [after - before for before, after in zip(middle, end, strict=True)]
    return Found(*forth, *back, memory.peak)


def measure_all(batch: int, width: int) -> dict[tuple[str, str], Found]:
    """By exchange and form of the blocks; and CLIP's, with and without gradients."""
    found: dict[tuple[str, str], Found] = {}
    for exchange in EXCHANGES:
        for form, block_loss in BLOCKS.items():
            loss = partial(distributed.siglip_loss, exchange=exchange, block_loss=block_loss)
            found[exchange.__name__, form] = measure(loss, batch, width)
    for form, grad in CLIP.items():
        loss = partial(clip_without_bias, gather_with_grad=grad)
        found["clip", form] = measure(loss, batch, width)
    return found


def clip_without_bias(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, **options: bool) -> Tensor:
    """CLIP's loss with the arguments of the others."""
    return distributed.clip_loss(images, texts, scale, **options)


# ---- table and figure --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One exchange at one size, measured."""

    processes: int
    batch: int
    width: int
    exchange: Exchange | None  # None: CLIP's gathering of both
    form: str
    found: Found  # of the process that sent most

    @property
    def sent(self) -> tuple[int, int]:
        """By the formula, forward and backward."""
        if self.exchange is None:
            sizes = self.batch, self.width, self.processes
            return costs.clip_bytes_sent(*sizes, gather_with_grad=CLIP[self.form])
        each = costs.bytes_sent(self.exchange, self.batch, self.width, self.processes)
        return each, each

    @property
    def peak(self) -> int | None:
        """By the formula, if there is one."""
        if self.exchange is None:
            return None
        chunk = CHUNK if self.form == "chunked" else None
        return costs.peak_bytes(self.exchange, self.batch, self.width, self.processes, chunk=chunk)

    def row(self) -> str:
        """Of the table."""
        found, (forth, back) = self.found, self.sent
        name = self.exchange.__name__ if self.exchange else "CLIP, gather both"
        cells = [str(self.processes), str(self.batch), name, self.form]
        cells.append(str(costs.rounds(self.exchange, self.processes)) if self.exchange else "2")
        cells += [f"{n / 1024:.0f}" for n in (forth, found.sent, found.received)]
        cells += [f"{n / 1024:.0f}" for n in (back, found.sent_back, found.received_back)]
        cells += ["" if n is None else f"{n / 2**20:.2f}" for n in (self.peak, found.peak)]
        return f"| {' | '.join(cells)} |"


HEADING = (
    "| processes | pairs each | exchange | form | rounds | forward KiB: formula | sent | received "
    "| backward KiB: formula | sent | received | peak MiB: formula | counted |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def cases(processes: int, batch: int, width: int) -> Iterator[Case]:
    """All exchanges in real processes."""
    everyone = distributed.run(processes, measure_all, batch, width, timeout=300.0)
    by_name: dict[str, Exchange] = {exchange.__name__: exchange for exchange in EXCHANGES}
    for name, form in everyone[0]:
        found = max((one[name, form] for one in everyone), key=lambda one: one.sent)
        yield Case(processes, batch, width, by_name.get(name), form, found)


def draw(measured: Sequence[Case], path: Path) -> None:
    """Lines: the formulas, to 1,024 processes. Points: what was counted."""
    from matplotlib.figure import Figure  # not above: every process imports this file

    figure = Figure(figsize=(13, 4), layout="constrained")
    sent, held, grown = figure.subplots(1, 3)
    many = [2**power for power in range(1, 11)]
    batches = [2**power for power in range(6, 13)]
    styles = zip(EXCHANGES, ("-", "--", "-", ":"), ("C0", "C1", "C2", "C3"), strict=True)
    for exchange, line, color in styles:
        name = exchange.__name__
        some = [case for case in measured if case.exchange is exchange and case.batch == BATCH]
        values = [costs.bytes_sent(exchange, BATCH, WIDTH, size) / 2**20 for size in many]
        sent.plot(
            many, values, line, color=color, label=f"{name}, formula", lw=4 if exchange is EXCHANGES[0] else 2
        )
        plain = [case for case in some if case.form == "plain"]
        sent.plot(
            [case.processes for case in plain], [case.found.sent / 2**20 for case in plain], "o", color=color
        )
    for form, color in zip(BLOCKS, ("C0", "C1"), strict=True):
        chunk = CHUNK if form == "chunked" else None
        values = [costs.peak_bytes(gather, BATCH, WIDTH, size, chunk=chunk) / 2**20 for size in many]
        held.plot(many, values, color=color, label=f"{form} blocks, formula")
        some = [case for case in measured if case.exchange is gather and case.form == form]
        points = [case for case in some if case.batch == BATCH]
        held.plot(
            [case.processes for case in points],
            [case.found.peak / 2**20 for case in points],
            "o",
            color=color,
        )
        values = [costs.peak_bytes(gather, size, WIDTH, 4, chunk=chunk) / 2**20 for size in batches]
        grown.plot(batches, values, color=color, label=f"{form} blocks, formula")
        points = [case for case in some if case.processes == 4]
        grown.plot(
            [case.batch for case in points], [case.found.peak / 2**20 for case in points], "o", color=color
        )
    sent.set_title(f"sent by a process in each pass, {BATCH} pairs each")
    held.set_title(f"held at most, {BATCH} pairs each, gather")
    grown.set_title("held at most, 4 processes, gather")
    for panel, label in ((sent, "processes"), (held, "processes"), (grown, "pairs in each process")):
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="MiB")
        panel.plot([], [], "o", color="gray", label="measured")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, and keep it with the figure where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the text; the figure goes beside it, as .png")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{name_of_cpu()}; {os.cpu_count()} cores, 1 thread in each process, gloo over TCP on this machine")
    say(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}")
    say(
        f"float32, width {WIDTH}, chunks of {CHUNK}; of the process that sent most; nothing in it is a time\n"
    )
    say(HEADING)
    measured: list[Case] = []
    for processes, batch in SIZES:
        for case in cases(processes, batch, WIDTH):
            measured.append(case)
            say(case.row())
    say(f"\nFormula only, {BATCH} pairs in each process:\n")
    say(
        "| processes | pairs in all | rounds of bidirectional | MiB sent in each pass | by reduce "
        "| peak MiB, gather, plain | chunked |"
    )
    say("|---|---|---|---|---|---|---|")
    for processes in (8, 64, 1024):
        cells = [
            f"{processes:,}",
            f"{processes * BATCH:,}",
            str(costs.rounds(bidirectional, processes)),
            *(
                f"{costs.bytes_sent(one, BATCH, WIDTH, processes) / 2**20:.1f}"
                for one in (bidirectional, reduce)
            ),
            *(
                f"{costs.peak_bytes(gather, BATCH, WIDTH, processes, chunk=chunk) / 2**20:.0f}"
                for chunk in (None, CHUNK)
            ),
        ]
        say(f"| {' | '.join(cells)} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")
        draw(measured, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
