"""What does a resampler keep of a picture, and what do its positions do?

Run: OMP_NUM_THREADS=1 python bench/resampler.py --out bench/results/resampler.txt

The shipped tower is frozen. Something makes fewer tokens of its 64, and a small reader, which stands for the
decoder, asks these for each color: which shape is it, and where? Both are trained together, for a fixed
number of steps, on drawn scenes whose things all have different colors. Three seeds: of the weights, of the
scenes and of their order. Measured on held-out scenes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import load
from minivlm.checks.qwen_vl import PlacedResampler
from minivlm.layers import MLP
from minivlm.vision.qwen_vl import QwenVLVisionConfig
from minivlm.world.scenes import COLORS, SHAPES, WORLD, Scene, make_scene

WIDTH = 128  # of the tokens that the reader sees
STEPS, BATCH = 400, 16
SCENES, HELD_OUT = 2000, 300
SEEDS = (0, 1, 2)


class AveragePooling(nn.Module):
    """Means of square blocks of patches, and a linear layer."""

    def __init__(self, patches_width: int, tokens: int) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        self.proj = nn.Linear(patches_width, WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, N, D_image] -> [B, n, D]."""
        side = math.isqrt(patches.shape[1])
        grid = patches.mT.unflatten(2, (side, side))  # [B, D_image, side, side]
        return self.proj(F.avg_pool2d(grid, side // self.side).flatten(2).mT)


def resampler(patches_width: int, tokens: int, places: Sequence[str] = ("queries", "keys")) -> nn.Module:
    """Qwen-VL's, with positions on its queries and keys, or elsewhere."""
    config = QwenVLVisionConfig(patches_width, num_attention_heads=2, num_queries=tokens, output_dim=WIDTH)
    return PlacedResampler(config, places)


class Numbered(nn.Module):
    """Adds a learned vector to each token: a reader takes tokens as a set, and can tell which is which."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.numbers = nn.Parameter(0.1 * torch.randn(tokens, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, n, D] -> [B, n, D]."""
        return tokens + self.numbers


class Reader(nn.Module):
    """Asks tokens about each color: which shape is it (0 for none), and where is its box?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.questions = nn.Parameter(0.1 * torch.randn(len(COLORS), width))
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.mlp = MLP(width, 2 * width)
        self.answer = nn.Linear(width, 5 + 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, n, D] -> scores of shapes [B, colors, 5], boxes [B, colors, 4]."""
        tokens = self.norm(tokens)
        asked = self.questions.expand(len(tokens), -1, -1)
        x = asked + self.attention(asked, tokens, tokens, need_weights=False)[0]
        x = x + self.mlp(self.norm_mlp(x))
        shapes, boxes = self.answer(x).split((5, 4), dim=-1)
        return shapes, boxes


Data = tuple[Tensor, Tensor, Tensor]  # features [M, N, D], shapes [M, colors], boxes [M, colors, 4]

# Name: what makes the tokens, from vectors of which width.
TRIALS: dict[str, Callable[[int], nn.Module]] = {
    "all 64, linear": lambda width: nn.Linear(width, WIDTH),
    "average pooling to 16": lambda width: AveragePooling(width, 16),
    "average pooling to 4": lambda width: AveragePooling(width, 4),
    "average pooling to 1": lambda width: AveragePooling(width, 1),
    "resampler, 16 queries": lambda width: resampler(width, 16),
    "resampler, 4 queries": lambda width: resampler(width, 4),
    "resampler, 1 query": lambda width: resampler(width, 1),
    "16 queries, positions nowhere": lambda width: resampler(width, 16, ()),
    "16 numbered queries": lambda width: nn.Sequential(resampler(width, 16), Numbered(16)),
    "16 numbered queries, positions nowhere": lambda width: nn.Sequential(
        resampler(width, 16, ()), Numbered(16)
    ),
}


def distinct_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes in which no two things have one color."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = make_scene(rng)
        if len({thing.color for thing in scene.things}) == len(scene.things):
            found.append(scene)
    return found


def labels_of(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """For each color its shape (0 for none) [M, 8], and its box as shares of the picture [M, 8, 4]."""
    shapes = torch.zeros(len(scenes), len(COLORS), dtype=torch.long)
    boxes = torch.zeros(len(scenes), len(COLORS), 4)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            column = list(COLORS).index(thing.color)
            shapes[row, column] = 1 + SHAPES.index(thing.shape)
            boxes[row, column] = torch.tensor(thing.box) / WORLD
    return shapes, boxes


@torch.no_grad()
def prepare(scenes: Sequence[Scene]) -> Data:
    """What the frozen tower makes of the pictures, and what is to be found in it."""
    model, processor = load()
    parts = [
        model.vision_tower(processor.image_processor([scene.draw(64) for scene in scenes[at : at + 100]]))
        for at in range(0, len(scenes), 100)
    ]
    return torch.cat(parts), *labels_of(scenes)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes [..., 4] with each other: [...]."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(dim=-1) for box in (a, b)]
    both = inside.prod(dim=-1)
    return both / (areas[0] + areas[1] - both)


def train(adapter: nn.Module, data: Data, seed: int, steps: int = STEPS) -> nn.Module:
    """Adapter and reader, trained together."""
    network = nn.Sequential(adapter, Reader(WIDTH))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    features, shapes, boxes = data
    for _ in range(steps):
        rows = torch.randint(len(features), (BATCH,), generator=order)
        named, placed = network(features[rows])
        is_there = shapes[rows] > 0
        loss = F.cross_entropy(named.flatten(0, 1), shapes[rows].flatten())
        loss = loss + 10 * F.l1_loss(placed[is_there], boxes[rows][is_there])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def measure(network: nn.Module, data: Data) -> tuple[float, float]:
    """Of the things in the pictures: the share whose shape is right, and the mean IoU of the boxes."""
    features, shapes, boxes = data
    named, placed = network(features)
    is_there = shapes > 0
    right = (named.argmax(dim=-1) == shapes)[is_there].float().mean()
    return right.item(), overlap(placed[is_there], boxes[is_there]).mean().item()


def run(seed: int, steps: int = STEPS, scenes: int = SCENES) -> dict[str, tuple[float, float]]:
    """Share of right shapes and mean IoU of every trial."""
    trained, held_out = distinct_scenes(scenes, 2 * seed), distinct_scenes(HELD_OUT, 2 * seed + 1)
    learned, measured = prepare(trained), prepare(held_out)
    found = {}
    for name, build in TRIALS.items():
        torch.manual_seed(seed)
        network = train(build(learned[0].shape[2]), learned, seed, steps)
        found[name] = measure(network, measured)
    return found


def as_text(results: Sequence[dict[str, tuple[float, float]]], steps: int = STEPS) -> str:
    """A line for each trial: means over seeds, and in brackets the least and the most."""
    lines = ["| tokens for the reader | shape right | box IoU |", "|---|---|---|"]
    for name in TRIALS:
        cells = []
        for values in zip(*(found[name] for found in results), strict=True):
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{steps} steps of {BATCH} pictures, {len(results)} seeds"])


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        results.append(run(seed))
        print(as_text(results), flush=True)
    if options.out:
        options.out.write_text(as_text(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
