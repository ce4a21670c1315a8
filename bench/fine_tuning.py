"""What does a model learn from 60 pictures, and what does it forget, by what is trained?

Run: OMP_NUM_THREADS=1 python bench/fine_tuning.py --out bench/results/fine_tuning

The shipped model learns a new question, for the number of corners of a thing, also of pentagons, which it
never saw. All ways get the same pictures in the same order, and 40 steps of 8 rows. The learning rates are
the defaults of `minivlm finetune`, 5e-3 for adapters and 1e-3 for weights; the projector, which is small, has
that of adapters. Measured on other pictures: the new question, and the six kinds of questions that the model
knew. Three seeds: of the pictures, their order, and the adapters' random weights. Also four learning curves,
with the loss on other pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from minivlm import load
from minivlm.adapters import LoraConfig, new_adapter
from minivlm.checks.fine_tuning import Row, corner_rows, exact, inputs_of, old_rows, tune

ROWS, HELD_OUT, OLD_SCENES = 60, 60, 10
STEPS = 40
SEEDS = (0, 1, 2)
# By what is trained: the learning rate. A number is the rank of an adapter with alpha = 2 r on all linear
# layers of the decoder's blocks.
WAYS: dict[str | int, float] = {
    "projector": 5e-3,
    "decoder": 1e-3,
    "everything": 1e-3,
    1: 5e-3,
    4: 5e-3,
    16: 5e-3,
}
# Name of a curve: learning rate, and pictures to learn from.
CURVES = {"slow": (2e-4, ROWS), "good": (5e-3, ROWS), "fast": (1e-1, ROWS), "few": (5e-3, 8)}
EVERY = 5  # steps between two measurements


def prepare(way: str | int, seed: int) -> tuple[Any, Any]:
    """The shipped model, of which that part can be trained."""
    model, processor = load()
    model.requires_grad_(False)
    if isinstance(way, int):
        new_adapter(
            model, LoraConfig(r=way, lora_alpha=2 * way), generator=torch.Generator().manual_seed(seed)
        )
    else:
        parts = {"projector": model.multi_modal_projector, "decoder": model.language_model}
        parts.get(way, model).requires_grad_(True)
    return model, processor


def trained_numbers(model: Any) -> int:
    """How many numbers can change."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def run(way: str | int, seed: int, steps: int = STEPS) -> dict[str, float]:
    """Train in one way, and measure."""
    model, processor = prepare(way, seed)
    learned, held_out, old = (
        corner_rows(ROWS, seed),
        corner_rows(HELD_OUT, 100 + seed),
        old_rows(OLD_SCENES, 12),
    )
    count = trained_numbers(model)
    losses = tune(model, processor, learned, WAYS[way], steps, seed)
    return {
        "seed": seed,
        "trained": count,
        "loss": mean(losses[-5:]),
        "new": exact(model, processor, held_out),
        "old": exact(model, processor, old),
    }


@torch.no_grad()
def loss_of(model: Any, processor: Any, rows: Sequence[Row]) -> float:
    """The loss on rows."""
    return float(model(**inputs_of(processor, rows)).loss)


def curve(rate: float, rows: int, steps: int = STEPS) -> dict[str, list[float]]:
    """The losses of an adapter of rank 4 on what it learns from, at each step, and on others, at some."""
    model, processor = prepare(4, 0)
    others = corner_rows(20, 100)
    validation = [loss_of(model, processor, others)]

    def look(step: int) -> None:
        if (step + 1) % EVERY == 0:
            validation.append(loss_of(model, processor, others))

    losses = tune(model, processor, corner_rows(rows, 0), rate, steps, after=look)
    return {
        "train": [round(loss, 4) for loss in losses],
        "validation": [round(loss, 4) for loss in validation],
    }


def name_of(way: str | int) -> str:
    """For the table."""
    return f"LoRA, rank {way}" if isinstance(way, int) else f"the {way}" if way != "everything" else way


def as_text(results: dict[str, list[dict[str, float]]]) -> str:
    """A line for each way: means over seeds, and in brackets the least and the most."""
    lines = ["| trained | numbers | new question | old questions |", "|---|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for kind in ("new", "old"):
            values = [run[kind] for run in runs]
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | {runs[0]['trained']:,.0f} | {' | '.join(cells)} |")
    seeds = len(next(iter(results.values())))
    return "\n".join([*lines, "", f"{STEPS} steps of 8 rows, seeds: {seeds}"])


def main() -> None:
    """Train, measure, and write the table and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, required=True, help="files without their suffixes .txt and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, float]]] = {name_of(way): [] for way in WAYS}
    curves: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        for way in WAYS:
            results[name_of(way)].append(run(way, seed))
            print(name_of(way), results[name_of(way)][-1], flush=True)
        for name in [name for name in CURVES if name not in curves]:
            curves[name] = curve(*CURVES[name])
        stored = {"ways": results, "curves": curves, "every": EVERY}
        options.out.with_suffix(".txt").write_text(as_text(results) + "\n", encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
