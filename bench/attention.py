"""Times the three forms of attention in minivlm/attention.py, plain, in blocks and fused, in turns.

Run: OMP_NUM_THREADS=1 python bench/attention.py | tee bench/results/attention.txt

Whatever else the machine does then meets all of them. A ratio is the time of a form divided by the time of
the plain one in the same round: above 1, the plain form is faster.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import minivlm.attention as package
from minivlm import masks
from minivlm.attention import additive, attend_fused, attend_in_blocks, attend_plain

FORMS = {"plain": attend_plain, "blocks": attend_in_blocks, "fused": attend_fused}


@dataclass(frozen=True)
class Case:
    """One shape: B rows, H heads, K key/value heads, T queries, S keys, width Dh."""

    name: str
    B: int
    H: int
    K: int
    T: int
    S: int
    Dh: int
    prefix: int | None  # length of the prefix under the prefix-LM mask; None: no mask

    def make(self, dtype: torch.dtype, grad: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Queries, keys, values, and the mask in the form that the models pass."""
        shapes = ((self.B, self.H, self.T), (self.B, self.K, self.S), (self.B, self.K, self.S))
        q, k, v = (torch.randn(*shape, self.Dh, dtype=dtype, requires_grad=grad) for shape in shapes)
        if self.prefix is None:
            return (q, k, v), None
        keys = torch.arange(self.S).expand(self.B, -1)
        queries = keys[:, self.S - self.T :]
        mask = masks.prefix_lm(queries, keys, torch.full((self.B,), self.prefix))[:, None]
        return (q, k, v), additive(mask, dtype)


CASES = (
    Case("tiny tower, training", 48, 3, 3, 64, 64, 32, None),
    Case("tiny decoder, training", 48, 4, 1, 160, 160, 32, 70),
    Case("tiny decoder, one picture", 1, 4, 1, 80, 80, 32, 80),
    Case("tiny decoder, next token", 1, 4, 1, 1, 100, 32, 80),
    Case("8 heads, 256 tokens", 1, 8, 1, 256, 256, 256, 256),
    Case("8 heads, 512 tokens", 1, 8, 1, 512, 512, 256, 512),
    Case("8 heads, 1024 tokens", 1, 8, 1, 1024, 1024, 256, 1024),
    Case("8 heads, 4103 tokens", 1, 8, 1, 4103, 4103, 256, 4103),
    Case("8 heads, next token of 1024", 1, 8, 1, 1, 1024, 256, 512),
    Case("8 heads, next token of 8192", 1, 8, 1, 1, 8192, 256, 512),
    Case("So400m tower, 8 pictures", 8, 16, 16, 256, 256, 72, None),
    Case("So400m tower, 4096 tokens", 1, 16, 16, 4096, 4096, 72, None),
)


def work(case: Case, dtype: torch.dtype, backward: bool) -> list[Callable[[], None]]:
    """The same computation in each of the forms."""
    (q, k, v), mask = case.make(dtype, grad=backward)
    scale = case.Dh**-0.5
    upstream = torch.randn(case.B, case.H, case.T, case.Dh, dtype=dtype)

    def form(attend: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            with torch.set_grad_enabled(backward):
                out = attend(q, k, v, mask, scale)
                if backward:
                    out.backward(upstream)
            q.grad = k.grad = v.grad = None

        return once

    with torch.no_grad():
        outputs = [attend(q, k, v, mask, scale) for attend in FORMS.values()]
    difference = max((out - outputs[0]).abs().max() for out in outputs)
    assert difference < (0.05 if dtype == torch.bfloat16 else 1e-4), (
        f"{case.name}: they differ by {difference}"
    )
    return [form(attend) for attend in FORMS.values()]


def taken(case: Case, dtype: torch.dtype, backward: bool) -> str:
    """Which of them `attend` chooses here."""
    (q, k, v), mask = case.make(dtype, grad=backward)
    calls: list[str] = []

    def noted(name: str, form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls.append(name)
            return form(*args)

        return call

    patched = {f.__name__: noted(name, f) for name, f in FORMS.items()}
    with mock.patch.multiple(package, **patched), torch.set_grad_enabled(backward):
        package.attend(q, k, v, mask, case.Dh**-0.5)
    return calls[0]


def seconds(function: Callable[[], None], calls: int) -> float:
    """Of one call, in the mean of some."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def measure(forms: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each form in each round, in turns; which one comes first changes from round to round."""
    calls = max(1, round(0.01 / seconds(forms[0], 2)))  # about 10 ms
    for form in forms[1:]:
        seconds(form, 1)
    times: list[list[float]] = [[] for _ in forms]
    for number in range(rounds):
        for place in range(len(forms)):
            chosen = (number + place) % len(forms)
            times[chosen].append(seconds(forms[chosen], calls))
    return times


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def processor() -> str:
    """The name of the CPU, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    amx = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {bf16} bf16 instructions{amx}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=31, help="of all forms in turns (default: 31)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"{processor()}; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}")
    print(f"{rounds} rounds; ratio = form / plain: median (quartiles); above 1 the plain form is faster\n")
    print("| shape | dtype | pass | plain ms | blocks / plain | fused / plain | `attend` takes |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                if backward and (case.T == 1 or case.T > 2000):
                    continue  # nobody trains on one token, or here on so many
                times = measure(work(case, dtype, backward), max(3, rounds // (1 + case.T // 500)))
                medians = [statistics.median(some) for some in times]
                cells = []
                for some in times[1:]:
                    ratios = [form / plain for form, plain in zip(some, times[0], strict=True)]
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
                choice = taken(case, dtype, backward)
                slower = medians[list(FORMS).index(choice)] / min(medians)
                verdict = "the fastest" if slower < 1.05 else f"{slower:.2f} times the fastest"
                print(
                    f"| {case.name} | {str(dtype).removeprefix('torch.')} "
                    f"| {'forward + backward' if backward else 'forward'} | {1000 * medians[0]:.3f} "
                    f"| {' | '.join(cells)} | {choice}, {verdict} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
