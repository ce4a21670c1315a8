"""A training run of two towers far too small to learn much, six steps long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.training.contrastive_recipe import ContrastiveConfig, build
from minivlm.training.loop import Loop

SIZES: dict[str, Any] = {
    "image_size": 16, "tower_width": 16, "tower_layers": 1, "tower_heads": 2,
    "text_width": 16, "text_layers": 1, "text_heads": 2, "max_length": 28,
}  # fmt: skip
RUN: dict[str, Any] = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "bf16": False}
EVERY = Loop(save_every=2, log_every=2, measure_every=0, workers=0, progress=False)


def config(objective: Any = "siglip", **changes: Any) -> ContrastiveConfig:
    return ContrastiveConfig(objective, **SIZES | RUN | changes)


def make_towers(folder: Path, objective: Any = "clip", **changes: Any) -> Path:
    """A folder with untrained towers."""
    for part in build(config(objective, **changes)):
        part.save_pretrained(folder)
    return folder


def make_pairs(folder: Path, lines: int = 10) -> Path:
    """A file of pairs: pictures of one gray each, and a number in words."""
    folder.mkdir(exist_ok=True)
    written = []
    for number in range(lines):
        Image.new("RGB", (20, 12), (number * 20,) * 3).save(folder / f"{number}.png")
        written.append(json.dumps({"image": f"{number}.png", "text": f"Gray number {number}"}))
    (folder / "pairs.jsonl").write_text("\n".join(written))
    return folder / "pairs.jsonl"
