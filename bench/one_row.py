"""The products of a token with a Gemma of 2 billion weights, by several kernels (minivlm/speed/one_row.py).

Run: python bench/one_row.py --out bench/results/one_row.txt
     python bench/one_row.py --rows 8 --out bench/results/few_rows.txt

All matrices that a token of PaliGemma 3B meets in the decoder: 18 layers and the head, in bf16, 5 GB. The
kernels take turns matrix by matrix. "oneDNN off" turns PyTorch's switch, which minivlm does not. Where the
processor has no bf16 instructions, PyTorch never uses oneDNN for bf16, and the first two are the same.
With --rows, as many tokens at a time, one of each row of a batch; two of the kernels are for one row alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import processor, spread
from torch import Tensor

from minivlm.speed.one_row import as_sparse_gradient

LAYERS, HIDDEN, KEYS, MLP, VOCABULARY = 18, 2048, 256, 16384, 257216
LAYER = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
LAYER += [(MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]


def as_it_is(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def without_onednn(x: Tensor, weight: Tensor) -> Tensor:
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags takes a while for products this short
    try:
        return F.linear(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)


def matrix_first(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.T).T.contiguous()


def matrix_times_vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x[0])


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": as_it_is,
    "F.linear, oneDNN off": without_onednn,
    "matrix first": matrix_first,
    "matrix times vector": matrix_times_vector,
    "sparse gradient": as_sparse_gradient,
}
ONE_ROW = ("matrix times vector", "sparse gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1, help="of a batch (default: 1)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kernels = {name: kernel for name, kernel in KERNELS.items() if options.rows == 1 or name not in ONE_ROW}
    shapes = LAYERS * LAYER + [(VOCABULARY, HIDDEN)]
    weights = [torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for shape in shapes]
    rows = {
        size: torch.empty(options.rows, size, dtype=torch.bfloat16).uniform_(-1, 1) for size in (HIDDEN, MLP)
    }
    tokens: dict[str, list[float]] = {name: [] for name in kernels}
    with torch.no_grad():
        for _ in range(options.rounds):
            spent = dict.fromkeys(kernels, 0.0)
            for number, weight in enumerate(weights):
                order, first = list(kernels), number % len(kernels)
                for name in order[first:] + order[:first]:
                    start = time.perf_counter()
                    kernels[name](rows[weight.shape[1]], weight)
                    spent[name] += time.perf_counter() - start
            for name in kernels:
                tokens[name].append(spent[name])
    size = sum(weight.nbytes for weight in weights)
    lines = [f"{processor()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}"]
    some = f"{size / 1e9:.2f} GB of bf16 weights, {options.rows} row(s)"
    lines += [f"{some}, {options.rounds} rounds: median (least to most)", ""]
    plain = tokens["F.linear"]
    for name, times in tokens.items():
        ratio = [mine / other for mine, other in zip(times, plain, strict=True)]
        token = statistics.median(times)
        speed = f"{token * 1e3:6.0f} ms   {size / token / 1e9:5.1f} GB/s"
        lines.append(f"{name:22} {speed}   {spread(ratio)} of F.linear")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
