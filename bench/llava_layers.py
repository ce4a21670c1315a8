"""Which layer of a CLIP tower says most about single places?

Run: python bench/llava_layers.py --out bench/results/llava_layers.txt --json minivlm/assets/llava_layers.json

Trains small CLIP towers on drawn pictures with their captions: the loss reads the class token of the last
layer alone, and the text tower is as plain as can be, a sum of one vector for each kind of thing and each
size. Then, layer by layer, a linear probe reads from each patch the color of the thing that lies on it. LLaVA
takes the second-last layer. Three seeds, two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.losses import clip_loss
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel
from minivlm.world.scenes import ALL_PAIRS, COLORS, SIZES, Scene, make_scene

SEEDS = (0, 1, 2)
STEPS, PICTURES, PROBED = 150, 48, 300
SIDE, PATCH, WIDTH, LAYERS = 32, 4, 64, 4
NAMES = [*(f"{color} {shape}" for color, shape in ALL_PAIRS), *SIZES]


def draw(rng: np.random.Generator, count: int) -> tuple[list[Scene], Tensor]:
    """Scenes of one or two things, and their pictures [count, 3, SIDE, SIDE]."""
    scenes = [make_scene(rng, "train", easy=True) for _ in range(count)]
    pixels = np.stack([np.asarray(scene.draw(SIDE, supersampling=2)) for scene in scenes])
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def bag(scenes: Sequence[Scene]) -> Tensor:
    """How often each name and each size is in a caption, [n, NAMES]."""
    said = [[word for thing in scene.things for word in (thing.name, thing.size)] for scene in scenes]
    return torch.tensor([[float(words.count(name)) for name in NAMES] for words in said])


def train(seed: int, steps: int) -> CLIPVisionModel:
    """A tower that has learned which caption belongs to which picture."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 0])
    tower = CLIPVisionModel(CLIPVisionConfig(WIDTH, 2 * WIDTH, LAYERS, 2, 3, SIDE, PATCH))
    parts = nn.ModuleDict(
        {"tower": tower, "image": nn.Linear(WIDTH, WIDTH), "text": nn.Linear(len(NAMES), WIDTH)}
    )
    scale = nn.Parameter(torch.tensor(2.3))
    optimizer = torch.optim.AdamW([*parts.parameters(), scale], lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        scenes, pixels = draw(rng, PICTURES)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = clip_loss(parts["image"](tower.pool(tower(pixels))), parts["text"](bag(scenes)), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tower


@torch.no_grad()
def probe(tower: CLIPVisionModel, seed: int, pictures: int = PROBED) -> list[float]:
    """For each hidden state, the share of patches with a thing whose color a linear layer reads rightly."""
    scenes, pixels = draw(np.random.default_rng([seed, 1]), pictures)
    colors = torch.from_numpy(np.stack([scene.patch_labels(SIDE // PATCH)["color"] for scene in scenes]))
    learned = 2 * pictures // 3
    wanted = F.one_hot(colors[:learned].flatten(), 1 + len(COLORS)).float()
    weight = 1 + 4 * (colors[:learned].flatten() > 0).float()[:, None]  # most patches are background
    on_thing = colors[learned:] > 0
    shares = []
    for hidden in tower.hidden_states(pixels):
        x = F.pad(F.layer_norm(hidden[:, 1:], (WIDTH,)), (0, 1), value=1.0)  # patches, and a bias
        known = x[:learned].flatten(0, 1)
        squares = known.T @ (known * weight) + 0.1 * torch.eye(WIDTH + 1)
        found = (x[learned:] @ torch.linalg.solve(squares, known.T @ (wanted * weight))).argmax(dim=-1)
        shares.append(round((found == colors[learned:])[on_thing].float().mean().item(), 3))
    return shares


def as_text(results: Sequence[dict[str, list[float]]]) -> str:
    """A line for each hidden state: the mean over seeds, the least and the most."""
    lines = ["| hidden state | untrained | trained | least and most |", "|---|---|---|---|"]
    for number in range(LAYERS + 1):
        before, after = ([result[kind][number] for result in results] for kind in ("untrained", "trained"))
        spread = f"{min(after):.2f} to {max(after):.2f}"
        lines.append(f"| {number - LAYERS - 1} | {mean(before):.2f} | {mean(after):.2f} | {spread} |")
    return "\n".join([*lines, "", f"{len(results)} seeds; share of patches whose color is read rightly"])


def main() -> None:
    """Train, probe, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        trained = {name: train(seed, steps) for name, steps in (("untrained", 0), ("trained", STEPS))}
        results.append({name: probe(tower, seed) for name, tower in trained.items()})
        print(as_text(results), flush=True)
    if options.out:
        options.out.write_text(as_text(results) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
