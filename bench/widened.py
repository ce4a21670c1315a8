"""A bf16 matrix times many rows, where the processor has no bf16 instructions (minivlm/speed/widened.py).

Run: OMP_NUM_THREADS=1 python bench/widened.py --out bench/results/widened.txt

The first matrix of an MLP of Gemma 2B, as PyTorch multiplies it in bf16, as minivlm does, and in fp32, where
it takes twice the memory. All three take turns, and ratios are of one turn. Where the processor has bf16
instructions, the first two are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import processor, spread

from minivlm.speed.widened import product

HIDDEN, MLP = 2048, 16384
ROWS = (1, 8, 16, 32, 64, 256, 1024)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    options = parser.parse_args()
    weight = torch.randn(MLP, HIDDEN).bfloat16()
    wide = weight.float()
    lines = [f"{processor()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}"]
    lines += [f"milliseconds, medians of {options.rounds} rounds; ratios with the least and the most", ""]
    lines += ["| rows | F.linear, bf16 | product, bf16 | F.linear, fp32 | F.linear, bf16 / product |"]
    lines += ["|---" * 5 + "|"]
    for rows in ROWS:
        x = torch.randn(rows, HIDDEN).bfloat16()
        kernels = (
            partial(F.linear, x, weight),
            partial(product, x, weight),
            partial(F.linear, x.float(), wide),
        )
        turns = [[seconds(kernel) for kernel in kernels] for _ in range(options.rounds + 1)][1:]
        times = " | ".join(f"{1e3 * statistics.median(column):.1f}" for column in zip(*turns, strict=True))
        lines.append(f"| {rows} | {times} | {spread([turn[0] / turn[1] for turn in turns])} |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
