"""Time and memory of the contrastive losses as the batch grows: softmax, sigmoid, chunked sigmoid.

Run: OMP_NUM_THREADS=1 python bench/losses.py --out bench/results/losses.txt

Each is measured in a process of its own, one at a time and one thread: value and gradients of embeddings,
scale and bias, in float32. Milliseconds are processor time, the median over rounds (least to most). Memory
is by how much the process grew at its largest, as the system counts it (ru_maxrss), over what it was with its
embeddings in place and the loss of a few pairs computed once; below a few MiB that is the system's grain.

softmax and sigmoid hold several matrices of n * n numbers. Where these need more memory than is free, they
are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from attention import processor as name_of_cpu
from torch import Tensor

from minivlm import distributed
from minivlm.losses import clip_loss, siglip_loss
from minivlm.speed.chunked_loss import chunked_siglip_loss

WIDTH = 64
BATCHES = (64, 256, 1024, 4096, 8192, 16384, 32768)
MATRICES = 6  # [n, n] that softmax or sigmoid hold at their peak: 5 and 6
ROUNDS, SECONDS = 15, 1.0  # a loss is computed so often, or until so much time has gone by

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "softmax": lambda images, texts, scale, bias: clip_loss(images, texts, scale),
    "sigmoid": siglip_loss,
    "chunked sigmoid": chunked_siglip_loss,
}


@dataclass(frozen=True)
class Cost:
    """Of one loss at one size."""

    name: str
    batch: int
    seconds: tuple[float, ...]  # of each round
    bytes: int


def grown() -> int:
    """The largest size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes() -> int:
    """Memory that is available, where the system tells; else half of what is built in."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def fits(name: str, batch: int) -> bool:
    """Whether the loss finds room, with a fifth to spare."""
    return name == "chunked sigmoid" or 1.2 * MATRICES * 4 * batch**2 < free_bytes()


def measure(name: str, batch: int) -> Cost:
    """In a process that does nothing else."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(batch, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor([value], requires_grad=True) for value in (2.3, -10.0))
    leaves = [images, texts, scale, bias]

    def once(rows: int = batch) -> float:
        start = time.process_time()
        loss = LOSSES[name](images[:rows], texts[:rows], scale, bias)
        torch.autograd.grad(loss, leaves, allow_unused=True)  # softmax has no bias
        return time.process_time() - start

    once(8)  # what the first call of all sets up
    before = grown()
    times = [once()]
    memory = grown() - before
    while sum(times) < SECONDS and len(times) <= ROUNDS:
        times.append(once())
    return Cost(name, batch, tuple(times[1:] or times), memory)  # the first one also asks for the memory


def row(name: str, batch: int, cost: Cost | None) -> str:
    """Of the table; without a cost, why there is none."""
    cells = [f"{batch:,}", name]
    if cost is None:
        need = MATRICES * 4 * batch**2 / 2**30
        cells += [f"left out: needs about {need:.0f} GiB, {free_bytes() / 2**30:.0f} are free", "", ""]
    else:
        low, middle, high = (1000 * f(cost.seconds) for f in (min, statistics.median, max))
        cells += [f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{cost.bytes / 2**20:.1f}"]
        cells.append(f"{cost.bytes / (4 * batch**2):.2f}")
    return f"| {' | '.join(cells)} |"


HEADING = (
    "| pairs | loss | ms, value and gradients | peak MiB | peak in matrices of n * n |\n|---|---|---|---|---|"
)


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Time and memory over the batch, each loss a line as far as it was measured."""
    from matplotlib.figure import Figure  # not above: every process imports this file

    figure = Figure(figsize=(9, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for name in LOSSES:
        some = [cost for cost in costs if cost.name == name]
        batches = [cost.batch for cost in some]
        middle = [statistics.median(cost.seconds) for cost in some]
        below = [mid - min(cost.seconds) for mid, cost in zip(middle, some, strict=True)]
        above = [max(cost.seconds) - mid for mid, cost in zip(middle, some, strict=True)]
        times.errorbar(batches, middle, yerr=[below, above], marker="o", capsize=3, label=name)
        large = [cost for cost in some if cost.bytes > 2**20]  # below, the system's grain
        memory.plot([cost.batch for cost in large], [cost.bytes / 2**20 for cost in large], "o-", label=name)
    for panel, label in ((times, "seconds, value and gradients"), (memory, "peak MiB")):
        panel.set(xscale="log", yscale="log", xlabel="pairs", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, and keep it with the figure where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=BATCHES[-1], help="pairs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the text; the figure goes beside it, as .png")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{name_of_cpu()}; {os.cpu_count()} cores, 1 thread used")
    say(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}")
    say(f"float32, width {WIDTH}; processor time, median (least to most); a process for each line\n")
    say(HEADING)
    costs: list[Cost] = []
    for batch in (batch for batch in BATCHES if batch <= options.most):
        for name in LOSSES:
            cost = None
            if fits(name, batch):
                (cost,) = distributed.run(1, "losses:measure", name, batch, timeout=600.0)
                costs.append(cost)
            say(row(name, batch, cost))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")
        draw(costs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
