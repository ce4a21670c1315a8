"""Is a locked image tower ahead because it is trained, or because the other towers are smaller?

Run: python bench/locked_tower.py --out bench/results/locked_tower.txt

`minivlm train-contrastive` with the shipped image tower locked (lit), and with new towers of exactly its size
of which nothing is locked (siglip), for the same number of steps on the same drawn pictures, and for three
times as many. The text tower is the same in both. Three seeds. Recall@1 of captions among 200 held-out
pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from minivlm.models.siglip import SigLIP
from minivlm.training.contrastive import ContrastiveRun, train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig, build
from minivlm.training.loop import Loop

STEPS = 160
SEEDS = (0, 1, 2)
TRIALS = {
    "the shipped tower, locked": ("lit", 1),
    "the same size from nothing, nothing locked": ("siglip", 1),
    "the same, three times as many steps": ("siglip", 3),
}


def run(seed: int, steps: int = STEPS) -> dict[str, float]:
    """Recall@1 of every trial."""
    base = ContrastiveConfig(seed=seed, steps=steps, warmup_steps=min(20, steps // 2))
    check_sizes(base)
    found = {}
    for name, (objective, times) in TRIALS.items():
        config = replace(base, objective=objective, steps=steps * times)
        with tempfile.TemporaryDirectory() as folder:
            trained: ContrastiveRun = train_contrastive(Path(folder), config, loop=Loop(measure_every=0))
        found[name] = trained.measure()["image to text recall@1"]
    return found


def check_sizes(config: ContrastiveConfig) -> None:
    """Both towers have the same shape. Raises AssertionError."""
    locked, new = (build(replace(config, objective=objective))[0] for objective in ("lit", "siglip"))
    assert isinstance(locked, SigLIP)
    assert isinstance(new, SigLIP)
    assert locked.config == new.config, f"{locked.config} and {new.config}"


def as_text(results: Sequence[dict[str, float]], steps: int = STEPS) -> str:
    """A line for each trial: the mean over seeds, the least and the most."""
    lines = ["| image tower | steps of 64 pairs | recall@1 among 200 | least and most |", "|---|---|---|---|"]
    for name, (_, times) in TRIALS.items():
        values = [found[name] for found in results]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {name} | {steps * times} | {mean(values):.2f} | {spread} |")
    return "\n".join([*lines, "", f"{len(results)} seeds"])


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        results.append(run(seed))
        print(as_text(results), flush=True)
    if options.out:
        options.out.write_text(as_text(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
