"""Do twelve post-norm blocks learn a small task, and does a warm-up or a smaller rate help them?

Run: OMP_NUM_THREADS=1 python bench/norm_order.py --out bench/results/norm_order.txt

The task of notebook 03: 8 tokens of 8 symbols, each token names the symbol of its left neighbor; guessing
gives a loss of ln 8 = 2.08. Twelve blocks of width 32, Adam, 400 steps of 16 rows, three seeds for weights
and rows. About three minutes on an idle machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import SiglipVisionConfig
from minivlm.layers import EncoderBlock

DEPTH, WIDTH, SYMBOLS, STEPS, SEEDS = 12, 32, 8, 400, (0, 1, 2)


class PostNormBlock(EncoderBlock):
    """The parts of the block, with each norm after the sum."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = self.layer_norm1(x + self.self_attn(x, mask))
        normed: Tensor = self.layer_norm2(x + self.mlp(x))
        return normed


# name, block, learning rate, steps of linear warm-up
RUNS: tuple[tuple[str, type[EncoderBlock], float, int], ...] = (
    ("pre-norm", EncoderBlock, 3e-3, 0),
    ("post-norm", PostNormBlock, 3e-3, 0),
    ("post-norm, warm-up", PostNormBlock, 3e-3, 100),
    ("post-norm, small rate", PostNormBlock, 3e-4, 0),
)


class Neighbor(nn.Module):
    """Symbols [B, 8] -> scores [B, 8, 8] for the symbol to the left."""

    def __init__(self, block_class: type[EncoderBlock]) -> None:
        super().__init__()
        sizes = SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
        self.blocks = nn.ModuleList(block_class(sizes) for _ in range(DEPTH))
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.symbols, self.head = nn.Embedding(SYMBOLS, WIDTH), nn.Linear(WIDTH, SYMBOLS)
        self.positions = nn.Parameter(torch.randn(SYMBOLS, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, symbols: Tensor) -> Tensor:
        """Scores for each place."""
        x = self.symbols(symbols) + self.positions
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def train(block_class: type[EncoderBlock], rate: float, warm_up: int, seed: int) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(seed)
    net, losses = Neighbor(block_class), []
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(warm_up, 1))
        symbols = torch.randint(SYMBOLS, (16, SYMBOLS))
        loss = F.cross_entropy(net(symbols).flatten(0, 1), symbols.roll(1, dims=1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    marks = (80, 200, STEPS)
    lines = [
        f"Mean loss of ten steps up to step {', '.join(map(str, marks))}; guessing gives 2.08.",
        "",
        "| run | rate | warm-up | seed | " + " | ".join(map(str, marks)) + " |",
        "|---" * (4 + len(marks)) + "|",
    ]
    for name, block_class, rate, warm_up in RUNS:
        for seed in SEEDS:
            losses = train(block_class, rate, warm_up, seed)
            means = " | ".join(f"{sum(losses[mark - 10 : mark]) / 10:.2f}" for mark in marks)
            lines.append(f"| {name} | {rate:g} | {warm_up} | {seed} | {means} |")
            print(lines[-1], flush=True)
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
