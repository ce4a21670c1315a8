"""What does each way to let a language model see buy, in one world and on one budget?

Run: python bench/systems.py --runs runs/systems --out bench/results/systems

Every way of `minivlm train --system` is trained with three seeds: the shipped tower, frozen; a language model
that has learned the world's sentences without a picture; the same rows in the same order. Then it answers
about held-out scenes. A run that was stopped goes on where it was, and one that is done is not done again, so
the table may be made in pieces (--systems, --seeds).

Columns: answers by task (exact), captions word for word, mean IoU of the boxes; weights that learn from
pictures; tokens of the decoder's row that a picture takes; operations of a training step and of an answer of
eight words, as shares of the largest; and the language model's loss on sentences without a picture before
and after the pictures, where it can read without one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from minivlm.evaluation import evaluate
from minivlm.models.load import load
from minivlm.training.loop import Loop, read_log
from minivlm.training.systems import SystemConfig, SystemRun, train_system
from minivlm.training.ways import WAYS
from minivlm.world.scenes import make_scene

SCENES = 500
ROWS = (
    "color",
    "shape",
    "size",
    "count",
    "existence",
    "relation",
    "all questions",
    "exact caption",
    "box mean IoU",
)
SHORT = {"all questions": "all", "exact caption": "caption", "box mean IoU": "IoU"}
ANSWER = 8  # words

Result = dict[str, Any]


def run(config: SystemConfig, folder: Path, scenes: int = SCENES) -> Result:
    """Train where that is not done yet, and measure."""
    done = folder / "result.json"
    if done.is_file():
        found: Result = json.loads(done.read_text(encoding="utf-8"))
        if found["config"] == asdict(config) and found["scenes"] == scenes:
            return found
        raise SystemExit(f"{folder} holds a run with other numbers: choose another folder with --runs")
    loop = Loop(
        resume=(folder / "state.safetensors").is_file(),
        save_every=100,
        measure_every=max(config.text_steps, 1),
    )
    train_system(folder, config, loop=loop)
    model, processor = load(folder)
    table = evaluate(model, processor, scenes=scenes, columns=("held_out",), progress=False)["held_out"]
    losses = [line["text loss"] for line in read_log(folder / "log.csv") if line.get("text loss") is not None]
    found = {
        "config": asdict(config),
        "scenes": scenes,
        **{name: round(table[name].value, 4) for name in ROWS},
        "majority": {name: round(table[name].baseline, 4) for name in ROWS},
        "text loss before": losses[0] if losses else None,
        "text loss after": losses[-1] if losses else None,
        **costs(config),
    }
    done.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def costs(config: SystemConfig) -> dict[str, int]:
    """Sizes, and operations of a step and of an answer. They depend on the way alone."""
    trained = SystemRun(replace(config, seed=0, text_steps=0, steps=1, warmup_steps=1), workers=0)
    batch = next(iter(trained.batches()))
    with FlopCounterMode(display=False) as step:
        trained.advance(batch)
    picture = make_scene(np.random.default_rng(0), "train").draw(64)
    inputs = trained.processor([picture], ["what color is the star?"])
    with FlopCounterMode(display=False) as answer, torch.inference_mode():
        trained.model.generate(**inputs, max_new_tokens=ANSWER)
    return {
        "trainable": sum(weight.numel() for weight in trained.parts["pictures"]),
        "image tokens": trained.model.config.num_image_tokens,
        "step": step.get_total_flops(),
        "answer": answer.get_total_flops(),
    }


def as_text(results: Sequence[Result]) -> str:
    """One line a way: means of its seeds, and under them how far the seeds lie apart."""
    largest = {cost: max(one[cost] for one in results) for cost in ("step", "answer")}
    names = [SHORT.get(name, name) for name in ROWS]
    head = ["way", *names, "learn", "image tokens", "step", "answer", "text loss before", "after", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for way in WAYS:
        seeds = [one for one in results if one["config"]["system"] == way]
        if not seeds:
            continue
        one = seeds[0]
        cells = [_spread([seed[name] for seed in seeds]) for name in ROWS]
        cells += [f"{one['trainable'] / 1000:.0f} k", str(one["image tokens"])]
        cells += [f"{one[cost] / largest[cost]:.2f}" for cost in largest]
        for name in ("text loss before", "text loss after"):
            told = [seed[name] for seed in seeds if seed[name] is not None]
            cells.append(f"{mean(told):.2f}" if told else "-")
        lines.append(f"| {way} | {' | '.join(cells)} | {len(seeds)} |")
    majority = results[0]["majority"]
    cells = [f"{majority[name]:.2f}" for name in ROWS]
    lines.append(f"| majority | {' | '.join(cells)} |{' |' * (len(head) - len(ROWS) - 1)}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    around = f" ({low:.2f}-{high:.2f})" if high - low >= 0.005 else ""
    return f"{mean(values):.2f}{around}"


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, help="write the table to OUT.txt and the numbers to OUT.json")
    parser.add_argument("--systems", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        for system in options.systems:
            results.append(run(SystemConfig(system, seed=seed), options.runs / f"{system}-{seed}"))
            print(as_text(results), flush=True)
    if options.out:
        table, numbers = (options.out.with_suffix(ending) for ending in (".txt", ".json"))
        table.write_text(as_text(results) + "\n", encoding="utf-8")
        numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
