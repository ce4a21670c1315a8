"""What processes hold and send in a step of training, beside what `minivlm plan` computes.

Run: OMP_NUM_THREADS=1 python bench/scaling.py --out bench/results/scaling.txt

A small PaliGemma takes two steps with AdamW in fp32, in 1 to 4 real processes, replicated (DDP) and divided
(FSDP2). Held are weights, gradients and moments of the process that holds most; sent are the bytes that the
kernel counts on its TCP connections in the second step. The formulas are those of `minivlm.distributed.plan`.
A reduce-scatter is measured by itself, since gloo's is not the one that the formulas count. Nothing here is a
time: four processes on one machine share its cores. Many machines were not at hand.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attention import processor as name_of_cpu
from exchanges import traffic
from PIL import Image
from torch import Tensor, nn

from minivlm import distributed
from minivlm.distributed import plan
from minivlm.distributed.parallel import data_parallel
from minivlm.distributed.sharded import own_part, shard
from minivlm.speed.checkpointing import blocks_of
from minivlm.training.recipe import TrainingConfig, build

CONFIG = TrainingConfig(text_width=256, text_layers=6)
ROWS, SIZES = 4, (1, 2, 3, 4)
SUMMED = 1_200_000  # numbers, for 2 to 4 processes
HEADING = "| processes | weights | held MB: formula | counted | sent MB: formula | counted |"


class Found(NamedTuple):
    """Bytes of one process."""

    held: int
    sent: int


def model_of(model: nn.Module) -> plan.Model:
    """Its numbers for the formulas; nothing is frozen, and activations are not compared."""
    weights = sum(weight.numel() for weight in model.parameters())
    return plan.Model(weights, weights, block=0, blocks=0, width=0, vocabulary=0)


def two_steps(divide: bool) -> Found:
    """In this process, one of several."""
    model, processor = build(CONFIG)
    inputs = processor(
        [[Image.new("RGB", (64, 64), "red")]] * ROWS,
        ["what color?"] * ROWS,
        suffixes=["red"] * ROWS,
        padding_side="right",
    )
    place = distributed.here()

    def loss() -> Tensor:
        found: Tensor = model(**inputs).loss
        return found

    compute: Callable[[], Any] = loss
    if place is not None and divide:
        shard(model, blocks_of(model), place)
    elif place is not None:
        compute = data_parallel(model, loss, place)
    optimizer = torch.optim.AdamW(model.parameters())
    sent = 0
    for _ in range(2):
        optimizer.zero_grad()
        if place is not None:
            dist.barrier()
        before = traffic()[0]
        compute().backward()
        sent = traffic()[0] - before
        optimizer.step()
    held = [own_part(x) for weight in model.parameters() for x in (weight, weight.grad) if x is not None]
    held += [own_part(x) for slots in optimizer.state.values() for x in slots.values() if x.dim()]
    return Found(sum(x.nbytes for x in held), sent)


def reduce_scatter() -> int:
    """Bytes that this process sends to sum up a million numbers, of which each gets its part."""
    size = dist.get_world_size()
    part = torch.empty(SUMMED // size)
    before = traffic()[0]
    summed = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its new name
    summed(part, torch.ones(size * len(part)))
    return traffic()[0] - before


def row(processes: int, divide: bool) -> str:
    """Of the table; of the process that holds, or sends, most."""
    found = distributed.run(processes, two_steps, divide)
    model, step = model_of(build(CONFIG)[0]), plan.Step(processes, ROWS * processes, 1, bf16=False)
    cost = (plan.divided if divide else plan.replicated)(model, step)
    numbers = (
        cost.weights + cost.gradients + cost.moments,
        max(one.held for one in found),
        cost.sent,
        max(one.sent for one in found),
    )
    how = "divided" if divide else "replicated"
    return f"| {processes} | {how} | " + " | ".join(f"{number / 1e6:.2f}" for number in numbers) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write what is printed there")
    options = parser.parse_args(arguments)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{name_of_cpu()}; gloo over TCP on this machine")
    say(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}; float32\n")
    say(f"{HEADING}\n{'|---' * 6}|")
    for processes in SIZES:
        for divide in (False, True) if processes > 1 else (False,):
            say(row(processes, divide))
    say("\n| processes | reduce-scatter of MB | sent MB: formula | counted |\n|---|---|---|---|")
    for processes in SIZES[1:]:
        sent = max(distributed.run(processes, reduce_scatter))
        ring = 4 * SUMMED * (processes - 1) / processes
        say(f"| {processes} | {4 * SUMMED / 1e6:.2f} | {ring / 1e6:.2f} | {sent / 1e6:.2f} |")
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
