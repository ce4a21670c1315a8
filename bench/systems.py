"""What does each way to let a language model see buy, in one world and on one budget?

Run: python bench/systems.py --runs runs/systems --out bench/results/systems
     python bench/systems.py --runs runs/systems --world small --out bench/results/systems_small
     python bench/systems.py --runs runs/systems --ship minivlm/assets/miniatures

Every way of `minivlm train --system` is trained with three seeds: the shipped tower, frozen; a language model
that has learned the world's sentences without a picture; the same rows in the same order. Then it answers
about held-out scenes. MAGiC comes last and trains nothing between its parts: it writes captions with the
language model of clipcap, guided by two towers, whose image tower is the shipped one. A run that was stopped
goes on where it was, and one that is done, or whose numbers OUT.json has already, is not done again. So the
table may be made in pieces (--systems, --seeds), also after its runs are gone.

The second command makes a table of its own, of the ways for things that are small in their picture: the same
scenes with things half as large, and pictures of 128 pixels. The third copies what was trained with seed 0
into folders that notebooks open.

Columns: answers by task (exact), captions word for word, mean IoU of the boxes; weights that learn from
pictures; tokens of the decoder's row that a picture takes; operations of a training step and of an answer of
eight words, as shares of the largest; and the language model's loss on sentences without a picture before
and after the pictures, where it can read without one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from kept import keep, read
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from minivlm.checkpoints.weights import WEIGHTS
from minivlm.evaluation import evaluate
from minivlm.evaluation.answers import questions_of
from minivlm.evaluation.columns import COLUMNS
from minivlm.generate import generate
from minivlm.models.load import load
from minivlm.models.miniatures.magic import magic_generate, match_with
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.log import read_log
from minivlm.training.loop import Loop
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
MAGIC = "magic"
WORLDS = {  # what is compared: ways that saw the same pictures
    "usual": (*(name for name, way in WAYS.items() if way.column == "held_out"), MAGIC),
    "small": tuple(name for name, way in WAYS.items() if way.column == "small_things"),
}
LONGEST_CAPTION = 40  # words and punctuation of five things
SHIPPED_SYSTEMS = (
    *("clipcap", "visualgpt", "flamingo", "llava", "cross-attention", "experts", MAGIC),
    *("small-tiles", "small-two-towers"),
)
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)
PAIR = ContrastiveConfig("lit", steps=1500, batch_size=48)  # MAGiC's towers: as many steps, as many pictures

Result = dict[str, Any]


def run(config: SystemConfig, folder: Path, scenes: int = SCENES) -> Result:
    """Train where that is not done yet, and measure."""
    known = read(folder, asdict(config), scenes)
    if known is not None:
        return known
    loop = Loop(
        resume=(folder / "state.safetensors").is_file(),
        save_every=100,
        measure_every=max(config.text_steps, 1),
    )
    train_system(folder, config, loop=loop)
    model, processor = load(folder)
    column = WAYS[config.system].column
    table = evaluate(model, processor, scenes=scenes, columns=(column,), progress=False)[column]
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
    keep(folder, found)
    return found


def numbers_of(system: str, seed: int, pair: ContrastiveConfig = PAIR) -> dict[str, Any]:
    """What a result says of its training."""
    if system == MAGIC:
        return {"system": MAGIC, **asdict(replace(pair, seed=seed))}
    return asdict(SystemConfig(system, seed=seed))


def magic(seed: int, runs: Path, scenes: int = SCENES, pair: ContrastiveConfig = PAIR) -> Result:
    """MAGiC's captions. Its language model is that of the run clipcap-SEED, which has to be done."""
    folder, pair = runs / f"{MAGIC}-{seed}", replace(pair, seed=seed)
    config = numbers_of(MAGIC, seed, pair)
    known = read(folder, config, scenes)
    if known is not None:
        return known
    model, processor = load(runs / f"clipcap-{seed}")
    resume = (folder / "state.safetensors").is_file()
    train_contrastive(folder, pair, loop=Loop(resume=resume, save_every=100, measure_every=0))
    towers, pairs = load(folder)
    for part in (model, towers):
        part.requires_grad_(False)
    asked = [one for one in questions_of(COLUMNS["held_out"], scenes, 1, 64) if one.example.task == "caption"]

    def caption(picture: Image.Image, words: int) -> str:
        match = match_with(towers, pairs, picture)
        return magic_generate(
            model.language_model, processor.tokenizer, match, "caption en", max_new_tokens=words
        )

    right = [caption(one.picture, LONGEST_CAPTION) == one.example.suffix for one in asked]
    with FlopCounterMode(display=False) as answer:
        caption(asked[0].picture, ANSWER)
    found = {
        "config": config,
        "scenes": scenes,
        "exact caption": round(mean(right), 4),
        "trainable": 0,
        "image tokens": 0,
        "answer": answer.get_total_flops(),
    }
    keep(folder, found)
    return found


def ship(runs: Path, out: Path) -> None:
    """Copy the checkpoints of seed 0."""
    for system in SHIPPED_SYSTEMS:
        ship_folder(runs / f"{system}-0", out / system)


def ship_folder(folder: Path, out: Path) -> None:
    """Copy one checkpoint in bf16, without what only training needs."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    tensors = load_file(folder / WEIGHTS)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, out / WEIGHTS, metadata={"format": "pt"})


def costs(config: SystemConfig) -> dict[str, int]:
    """Sizes, and operations of a step and of an answer. They depend on the way alone."""
    trained = SystemRun(replace(config, seed=0, text_steps=0, steps=1, warmup_steps=1), workers=0)
    batch = next(iter(trained.batches()))
    with FlopCounterMode(display=False) as step:
        trained.advance(batch)
    trained.model.requires_grad_(False)  # the counter asks what has a gradient where it came from
    picture = make_scene(np.random.default_rng(0), "train").draw(64)
    inputs = trained.processor([picture], ["what color is the star?"])
    with FlopCounterMode(display=False) as answer, torch.inference_mode():
        generate(trained.model, **inputs, max_new_tokens=ANSWER, eos_token_id=-1)  # nothing ends it early
    return {
        "trainable": sum(weight.numel() for weight in trained.parts["pictures"]),
        "image tokens": trained.model.config.num_image_tokens,
        "step": step.get_total_flops(),
        "answer": answer.get_total_flops(),
    }


def as_text(results: Sequence[Result]) -> str:
    """One line a way: means of its seeds, and under them how far the seeds lie apart."""
    largest = {cost: max(one.get(cost, 0) for one in results) for cost in ("step", "answer")}
    names = [SHORT.get(name, name) for name in ROWS]
    head = ["way", *names, "learn", "image tokens", "step", "answer", "text loss before", "after", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for way in (*WAYS, MAGIC):
        seeds = [one for one in results if one["config"]["system"] == way]
        if not seeds:
            continue
        one = seeds[0]
        cells = [_spread([seed[name] for seed in seeds]) if name in one else "-" for name in ROWS]
        cells += [f"{one['trainable'] / 1000:.0f} k", str(one["image tokens"])]
        cells += [f"{one[cost] / largest[cost]:.2f}" if cost in one else "-" for cost in largest]
        for name in ("text loss before", "text loss after"):
            told = [seed[name] for seed in seeds if seed.get(name) is not None]
            cells.append(f"{mean(told):.2f}" if told else "-")
        lines.append(f"| {way} | {' | '.join(cells)} | {len(seeds)} |")
    for majority in [one["majority"] for one in results if "majority" in one][:1]:
        cells = [f"{majority[name]:.2f}" for name in ROWS]
        lines.append(f"| majority | {' | '.join(cells)} |{' |' * (len(head) - len(ROWS) - 1)}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    around = f" ({low:.2f}-{high:.2f})" if high - low >= 0.005 else ""
    return f"{mean(values):.2f}{around}"


def stored(out: Path) -> dict[tuple[int, str], Result]:
    """What OUT.json has, by seed and way."""
    numbers = out.with_suffix(".json")
    results: list[Result] = json.loads(numbers.read_text(encoding="utf-8")) if numbers.is_file() else []
    return {(one["config"]["seed"], one["config"]["system"]): one for one in results}


def write(results: Sequence[Result], out: Path) -> None:
    """The table into OUT.txt, the numbers into OUT.json."""
    table, numbers = (out.with_suffix(ending) for ending in (".txt", ".json"))
    table.write_text(as_text(results) + "\n", encoding="utf-8")
    numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, help="write the table to OUT.txt and the numbers to OUT.json")
    parser.add_argument("--ship", type=Path, help="copy checkpoints of seed 0 into folders there, and stop")
    parser.add_argument("--world", choices=WORLDS, default="usual", help="all its ways (default: usual)")
    parser.add_argument("--systems", nargs="+", choices=[*WAYS, MAGIC], help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.ship:
        ship(options.runs, options.ship)
        return
    ways = WORLDS[options.world]
    results = stored(options.out) if options.out else {}
    if others := {*(options.systems or ()), *(system for _, system in results)} - {*ways}:
        names = ", ".join(sorted(others))
        parser.error(f"{names}: not of the world {options.world!r}, choose another --world or --out")
    for seed in options.seeds:
        for system in options.systems or ways:
            known = results.get((seed, system))
            if known is None or known["config"] != numbers_of(system, seed):
                folder = options.runs / f"{system}-{seed}"
                results[seed, system] = (
                    magic(seed, options.runs)
                    if system == MAGIC
                    else run(SystemConfig(system, seed=seed), folder)
                )
            ordered = sorted(results, key=lambda one: (one[0], ways.index(one[1])))
            table = [results[one] for one in ordered]
            print(as_text(table), flush=True)
            if options.out:
                write(table, options.out)


if __name__ == "__main__":
    main()
