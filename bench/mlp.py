"""How long MLPs take on many rows: whole, in pieces, and in place (minivlm/speed/pieces.py).

Run: python bench/mlp.py --out bench/results/mlp_amx.txt

The MLPs of some systems, as many layers of each as 0.5 GB of bf16 weights hold, on as many tokens as a
picture and a prompt have there. The ways take turns, and a ratio is the time of a way by that of the plain
MLP in the same round. "As used" is what the package does on this processor.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from attention import processor, spread
from torch import Tensor, nn

from minivlm.layers import MLP, GatedMLP, SwiGLU
from minivlm.speed import pieces
from minivlm.speed.pieces import GatedMLPInPieces, InPieces, MLPInPieces, SwiGLUInPieces
from minivlm.speed.replacing import replaced

GIGABYTES = 0.5
SHORT = 256  # tokens of a piece


class Case(NamedTuple):
    """An MLP and how many tokens it gets."""

    name: str
    plain: type[nn.Module]
    fast: type[InPieces]
    hidden_size: int
    intermediate_size: int
    tokens: int


CASES = (
    Case("SigLIP So400m, 224 pixels", MLP, MLPInPieces, 1152, 4304, 256),
    Case("SigLIP So400m, 448 pixels", MLP, MLPInPieces, 1152, 4304, 1024),
    Case("PaliGemma 3B, 224 pixels", GatedMLP, GatedMLPInPieces, 2048, 16384, 263),
    Case("PaliGemma 3B, 896 pixels", GatedMLP, GatedMLPInPieces, 2048, 16384, 4103),
    Case("DeepSeek-VL 1.3B", SwiGLU, SwiGLUInPieces, 2048, 5632, 665),
    Case("Qwen2-VL 2B, 1,000 image tokens", SwiGLU, SwiGLUInPieces, 1536, 8960, 1040),
)


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of all layers, by way."""
    torch.manual_seed(0)
    plain = case.plain(case.hidden_size, case.intermediate_size).bfloat16()
    size = sum(weight.nbytes for weight in plain.parameters())
    layers = [copy.deepcopy(plain) for _ in range(max(1, round(GIGABYTES * 1e9 / size)))]
    fast = [replaced(layer, case.fast) for layer in layers]
    x = torch.randn(1, case.tokens, case.hidden_size).bfloat16()

    def in_short_pieces(layer: InPieces, x: Tensor) -> Tensor:
        parts = x.flatten(0, -2).tensor_split(max(1, round(case.tokens / SHORT)))
        return torch.cat([layer.at_once(part) for part in parts]).view_as(x)

    ways: dict[str, Callable[[int, Tensor], Tensor]] = {
        "plain": lambda number, x: layers[number](x),
        "in place": lambda number, x: fast[number].at_once(x),
        f"in place, pieces of {SHORT}": lambda number, x: in_short_pieces(fast[number], x),
        "as used": lambda number, x: fast[number](x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                for number in range(len(layers)):
                    way(number, x)
                seconds[name].append((time.perf_counter() - start) / len(layers))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [f"{processor()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}; bf16"]
    lines += [f"{options.rounds} rounds: median (least to most) of time by that of the plain MLP", ""]
    long = pieces.tokens_per_piece(torch.bfloat16)
    lines += [f"as used: in place, pieces of about {long} tokens", ""]
    for case in CASES:
        seconds = measure(case, options.rounds)
        base = seconds["plain"]
        ratios = {
            name: spread([mine / other for mine, other in zip(times, base, strict=True)])
            for name, times in seconds.items()
            if name != "plain"
        }
        told = "   ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        lines.append(f"{case.name + ', ' + str(case.tokens) + ' tokens':44} {told}")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
